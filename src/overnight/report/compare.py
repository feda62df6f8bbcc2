"""Several runs on one page: their final figures, their losses over tokens, what differs in their recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overnight.report import plots
from overnight.report.html import (
    Markup,
    element,
    escape,
    joined,
    notice,
    page,
    paragraph,
    section,
    shown,
    table,
)
from overnight.report.plots import RUN_COLOURS, check_matplotlib
from overnight.report.run_data import RunData, is_finite, median, read_run
from overnight.run_directory import write_atomically
from overnight.terminal import duration, short, significant


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about several runs to `out`; returns where it lies."""
    write_atomically(out, compare_runs(runs))
    return out


def compare_runs(runs: Sequence[Path]) -> str:
    """The page about several runs, as HTML. Raises ValueError if matplotlib is not installed."""
    check_matplotlib()
    records = [read_run(run) for run in runs]
    names = _names(records)
    body = joined(
        [
            paragraph("overnight · comparison", "kicker"),
            element("h1", f"{len(names)} runs, side by side"),
            _notices(records, names),
            section("Final figures", _figures(records, names)),
            section("Loss", _loss(records, names)),
            section("What differs", _differences(records, names)),
        ]
    )
    return page("Comparison of " + ", ".join(names), body)


def _names(records: Sequence[RunData]) -> list[str]:
    """The runs' names; their paths where two runs are called the same."""
    names = [record.status.name for record in records]
    return names if len(set(names)) == len(names) else [record.status.path for record in records]


def _notices(records: Sequence[RunData], names: Sequence[str]) -> Markup:
    problems = [
        f"{name}: {problem}"
        for record, name in zip(records, names, strict=True)
        for problem in record.problems
    ]
    if any(record.data != records[0].data for record in records):
        problems.append("these runs did not all use the same data: compare their losses with care")
    return notice(problems)


def _figures(records: Sequence[RunData], names: Sequence[str]) -> Markup:
    best = _best(records)
    rows = (
        [_swatch(index, name), *_cells(record, record is best)]
        for index, (record, name) in enumerate(zip(records, names, strict=True))
    )
    header = (
        *("run", "validation", "training", "bits/byte", "tokens"),
        *("tokens/s", "time in steps", "size", "state"),
    )
    return joined(
        [
            table(header, rows),
            paragraph(
                "The validation and training losses are in nats per token, and compare only between runs "
                "with the same tokenizer; bits per byte compare across tokenizers, on the same text.",
                "quiet",
            ),
        ]
    )


def _best(records: Sequence[RunData]) -> RunData | None:
    """The run with the lowest validation loss, if all were judged on the same data."""
    judged = [one for one in records if one.evaluations and is_finite(one.evaluations[-1]["loss"])]
    if not judged or any(one.data != records[0].data for one in records):
        return None
    return min(judged, key=lambda one: float(one.evaluations[-1]["loss"]))


def _swatch(index: int, name: str) -> Markup:
    """The run's colour and name; a ring instead of a disc stands for dashed lines."""
    repeated, number = divmod(index, len(RUN_COLOURS))
    css = "swatch ring" if repeated % 2 else "swatch"
    return Markup(f'<span class="{css}" style="color: var(--run-{number + 1})"></span>{escape(name)}')


def _cells(record: RunData, is_best: bool) -> Iterator[object]:
    evaluation = record.evaluations[-1] if record.evaluations else {}
    metrics, parameters = record.metrics, record.environment.get("parameters")
    loss = significant(evaluation["loss"]) if evaluation else "–"
    yield element("span", loss, "best") if is_best else loss
    yield significant(record.smoothed_loss()[-1]) if record.steps else "–"
    bits = evaluation.get("bits_per_byte")
    yield significant(bits) if is_finite(bits) else "–"
    yield short(metrics["tokens"][-1]) if record.steps else "0"
    yield short(speed) if (speed := median(metrics["tokens_per_second"])) is not None else "–"
    milliseconds = metrics["milliseconds"]
    yield duration(float(np.nansum(milliseconds)) / 1000) if np.isfinite(milliseconds).any() else "–"
    yield short(parameters) if is_finite(parameters) else "–"
    yield record.status.state


def _loss(records: Sequence[RunData], names: Sequence[str]) -> Markup:
    if not any(record.steps >= 2 for record in records):
        return paragraph("None of these runs has two finished steps, so there is nothing to draw.")
    caption = (
        "<strong>Nats per token.</strong> Strong, with a point at each evaluation: the validation loss. "
        "Light: the training loss, averaged over about a hundredth of each run."
    )
    return Markup(
        f"<figure><figcaption>{caption}</figcaption>{plots.overlay_charts(records, names)}</figure>"
    )


def _differences(records: Sequence[RunData], names: Sequence[str]) -> Markup:
    flat = [dict(_settings(record.recipe)) for record in records]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    differing = [
        key for key in keys if key != "run_name" and any(one.get(key) != flat[0].get(key) for one in flat)
    ]
    if not differing:
        return paragraph("Their recipes are the same, but for the runs' names.")
    rows = ([key, *(shown(one[key]) if key in one else "–" for one in flat)] for key in differing)
    return table(("setting", *names), rows)


def _settings(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of a recipe by its name alone, which is unique over all sections."""
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield name, value
