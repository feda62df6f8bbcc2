"""Several runs on one page: their final figures, their losses over tokens, what differs in their recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from overnight.files import write_atomically
from overnight.report.html import render, show_value
from overnight.report.page import Table
from overnight.report.plots import RUN_COLOURS, check_matplotlib, comparison_chart
from overnight.report.run_data import RunData, is_finite, median, read_run
from overnight.terminal import duration, shell_command, short, significant

TITLES = (
    *("run", "validation", "95% interval", "on tokens", "training", "bits/byte", "tokens"),
    *("tokens/s", "time in steps", "size", "state"),
)


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write the page about several runs to `out` and return `out`."""
    write_atomically(out, comparison_page(paths))
    return out


def comparison_page(paths: Sequence[Path]) -> str:
    """The page about several runs, as HTML. Raises ValueError if matplotlib is not installed."""
    check_matplotlib()
    runs = [read_run(path) for path in paths]
    names = [run.status.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.status.path for run in runs]
    notices = [
        f"{name}: {problem}" for run, name in zip(runs, names, strict=True) for problem in run.problems
    ]
    if any(run.data != runs[0].data for run in runs):
        notices.append("these runs did not all use the same data: compare their losses with care")
    precisions = {str(run.environment.get("precision", "unknown")) for run in runs}
    if len(precisions) > 1:
        notices.append(
            f"these runs were evaluated in different precisions, {', '.join(sorted(precisions))}: "
            "`overnight evaluate` measures all of them in one"
        )
    ranked = _ranked(runs)
    close = [run for run in ranked[1:] if not _is_apart(ranked[0], run)]
    best = ranked[0] if ranked and not close else None
    if close:
        best_two = Path(ranked[0].status.path), "--baseline", Path(close[0].status.path)
        notices.append(
            "the intervals of the validation losses do not tell which run is best; compare two of them in "
            f"pairs, on the same text: {shell_command('evaluate', *best_two)}"
        )
    rows = [
        [_swatch(index, name), *_cells(run, run is best)]
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return render(
        "comparison.html",
        title="Comparison of " + ", ".join(names),
        names=names,
        notices=notices,
        figures=Table(TITLES, rows),
        chart=comparison_chart(runs, names) if any(run.steps >= 2 for run in runs) else None,
        differences=Table(("setting", *names), list(_differences(runs))),
    )


def _ranked(runs: Sequence[RunData]) -> list[RunData]:
    """The evaluated runs, lowest validation loss first; [] unless all have the same data and precision."""
    conditions = [(run.data, run.environment.get("precision")) for run in runs]
    if any(each != conditions[0] for each in conditions):
        return []
    evaluated = [run for run in runs if is_finite(run.last_evaluation.get("loss"))]
    return sorted(evaluated, key=lambda run: float(run.last_evaluation["loss"]))


def _is_apart(lower: RunData, higher: RunData) -> bool:
    """True if both losses have intervals, which do not overlap."""
    ends, others = lower.loss_interval, higher.loss_interval
    return ends is not None and others is not None and ends[1] < others[0]


def _swatch(index: int, name: str) -> Markup:
    """The run's colour and name; a ring instead of a disc stands for dashed lines."""
    repeated, number = divmod(index, len(RUN_COLOURS))
    css = "swatch ring" if repeated % 2 else "swatch"
    return Markup('<span class="{}" style="color: var(--run-{})"></span>{}').format(css, number + 1, name)


def _cells(run: RunData, is_best: bool) -> Iterator[object]:
    """A row of the final figures, in the order of TITLES."""
    evaluation, metrics, parameters = run.last_evaluation, run.metrics, run.environment.get("parameters")
    loss = significant(evaluation["loss"]) if evaluation else "–"
    yield Markup('<span class="best">{}</span>').format(loss) if is_best else loss
    yield " to ".join(map(significant, run.loss_interval)) if run.loss_interval else "–"
    yield short(evaluation["evaluated_tokens"]) if is_finite(evaluation.get("evaluated_tokens")) else "–"
    yield significant(run.smoothed_loss()[-1]) if run.steps else "–"
    bits = evaluation.get("bits_per_byte")
    yield significant(bits) if is_finite(bits) else "–"
    yield short(metrics["tokens"][-1]) if run.steps else "0"
    yield short(speed) if (speed := median(metrics["tokens_per_second"])) is not None else "–"
    yield duration(run.training_seconds) if run.training_seconds is not None else "–"
    yield short(parameters) if is_finite(parameters) else "–"
    yield run.status.state


def _differences(runs: Sequence[RunData]) -> Iterator[list[str]]:
    """A row for each setting that is not the same in all recipes."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "run_name")
    for name in names:
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs):
            yield [name, *(show_value(run.settings[name]) if name in run.settings else "–" for run in runs)]
