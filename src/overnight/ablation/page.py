"""The results of a campaign as a text of 80 columns, and as a self-contained page with plots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from overnight.ablation.paired import PairedDifference
from overnight.ablation.record import AblationRecord, ArmResult
from overnight.report.html import render, show_value, text_templates
from overnight.report.page import Table
from overnight.report.plots import MUTED, comparison_chart, in_box, new_chart, run_style
from overnight.report.run_data import read_run
from overnight.terminal import duration, short, significant, wrap

COLUMNS = 80
LONGEST_NAME = 22
RESULTS = ("loss", "difference", "95% interval", "verdict")
COSTS = ("parameters", "FLOPs/token", "time", "bits/byte", "to tell")
ROW, WIDTH = 44, 880
MARGINS = (14, 132, 40, 240)
"""Of the chart of differences, in CSS pixels: top, right, bottom, left."""


def ablation_text(record: AblationRecord) -> str:
    """The two tables and the sentences, at most 80 columns wide."""
    environment = text_templates("overnight.ablation")
    environment.filters |= {"short": short}
    results, costs = rows_of_tables(record)
    text = environment.get_template("ablation.txt").render(
        record=record,
        results=[("arm", *RESULTS), *((_shortened(name), *cells) for name, *cells in results)],
        costs=[("arm", *COSTS), *((_shortened(name), *cells) for name, *cells in costs)],
        width=max(len(_shortened(arm.name)) for arm in record.arms),
        evaluated_tokens=max(run.evaluated_tokens for run in record.runs),
        sentences=[*sentences(record)],
    )
    lines = [
        line
        for part in text.splitlines()
        for line in (wrap(part, COLUMNS) if len(part) > COLUMNS else [part])
    ]
    return "\n".join(line.rstrip() for line in lines)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def rows_of_tables(record: AblationRecord) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of the two tables, each with the arm's name."""
    results = [(arm.name, *result_cells(record, arm)) for arm in record.arms]
    return results, [(arm.name, *cost_cells(arm)) for arm in record.arms]


def result_cells(record: AblationRecord, arm: ArmResult) -> tuple[str, ...]:
    """An arm's figures in the order of RESULTS; a dash where there is none."""
    found, loss = arm.nats_difference, "–" if arm.loss is None else f"{arm.loss:.4f}"
    if found is None:
        return loss, "–", "–", "baseline" if arm is record.arms[0] else "no pair"
    interval = "–" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return loss, f"{found.mean:+.4f}", interval, verdict_text(found)


def cost_cells(arm: ArmResult) -> tuple[str, ...]:
    """An arm's figures in the order of COSTS."""
    found, bits, ratio = arm.nats_difference, arm.bits_difference, arm.step_time_ratio
    return (
        short(arm.parameters),
        short(arm.flops_per_token),
        f"{ratio:.2f}x" if ratio else "–",
        f"{bits.mean:+.4f}" if bits else "–",
        f"{found.seeds_to_tell:,}" if found and found.seeds_to_tell else "–",
    )


def verdict_text(difference: PairedDifference) -> str:
    """The verdict, or why there is none."""
    return difference.verdict or "one seed: none"


def sentences(record: AblationRecord) -> Iterator[str]:
    """The sentences below the tables."""
    count, baseline = len(record.compared), record.arms[0].name
    made = "One comparison was" if count == 1 else f"{count} comparisons, each with its own interval, were"
    expected = "" if count == 1 else f": on average {count / 20:g} of these"
    chance = "Without a true difference, one in twenty is called better or worse by chance"
    yield f"{made} made. {chance}{expected}."
    for arm in record.compared:
        yield from equal_loss_sentences(arm, baseline, record.total_tokens)
        pairs = len(arm.nats_difference.values) if arm.nats_difference else 0
        if pairs < len(record.seeds):
            yield (
                f"{arm.name} was compared on {pairs} of {len(record.seeds)} seeds; runs that failed are "
                "missing, which may favour the arm that failed."
            )
    yield from record.notices
    yield from record.failures


def equal_loss_sentences(arm: ArmResult, baseline: str, total_tokens: int) -> Iterator[str]:
    """Which tokens, and time, each of the two needs for the other's final loss."""
    if (equal := arm.equal_loss) is None or not arm.changes:
        return
    parts = []
    for name, other, tokens, seconds in (
        (arm.name, baseline, equal.tokens, equal.seconds),
        (baseline, arm.name, equal.baseline_tokens, equal.baseline_seconds),
    ):
        if tokens is None:
            parts.append(f"{name} has not reached the final loss of {other}")
            continue
        time = "" if seconds is None else f", {duration(seconds)} of steps"
        parts.append(
            f"{name} reached the final loss of {other} within {short(tokens)} of {short(total_tokens)} "
            f"tokens ({tokens / total_tokens:.0%}{time})"
        )
    yield f"{'; '.join(parts)}."


def ablation_page(record: AblationRecord) -> str:
    """The page as HTML. Raises ValueError if matplotlib is not installed."""
    results, costs = rows_of_tables(record)
    return render(
        "ablation.html",
        package="overnight.ablation",
        title=f"Ablation {record.name}",
        record=record,
        evaluated_tokens=max(run.evaluated_tokens for run in record.runs),
        sentences=[*sentences(record)],
        results=Table(("arm", *RESULTS), results),
        costs=Table(("arm", *COSTS), costs),
        losses=loss_curves(record),
        differences=difference_chart(record) if any(arm.nats_difference for arm in record.compared) else None,
        changes=changes_table(record),
        by_seed=seeds_table(record),
        tried=tried_table(record),
    )


def loss_curves(record: AblationRecord) -> Markup | None:
    """The curves of all finished runs, each arm in its colour and named once; None if there are none."""
    finished = [(at, run) for at, arm in enumerate(record.arms) for run in arm.runs if run.failure is None]
    drawn = [(at, run.arm, data) for at, run in finished if (data := read_run(Path(run.path))).steps >= 2]
    styles = [at for at, _, _ in drawn]
    names = [name if styles.index(at) == number else "" for number, (at, name, _) in enumerate(drawn)]
    return comparison_chart([data for _, _, data in drawn], names, styles) if drawn else None


def difference_chart(record: AblationRecord) -> Markup:
    """For each arm its mean difference and interval as a bar, and a dot for each seed; a line at 0."""
    arms = [(arm, found) for arm in record.compared if (found := arm.nats_difference)]
    description = "Differences from the baseline, nats per token"
    top, _, bottom, _ = MARGINS
    with new_chart(description, (WIDTH, top + bottom + ROW * len(arms)), MARGINS) as (figure, axes):
        at: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        for row, (arm, found) in enumerate(arms):
            colour = run_style(record.arms.index(arm))["color"]
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=colour, linewidth=7, alpha=0.25)
            axes.plot(found.values, np.full(len(found.values), row), "o", color=colour, markersize=3.5)
            axes.plot([found.mean], [row], "|", color=colour, markersize=20, markeredgewidth=2.5)
            for text, x, shift, side in (
                (_shortened(arm.name), 0, -12, "right"),
                (verdict_text(found), 1, 12, "left"),
            ):
                axes.annotate(text, (x, row), (shift, 0), ha=side, va="center", color=colour, **at)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0), max(high, 0))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.grid(visible=False)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="x", pad=7)
        return in_box(figure, description)


def changes_table(record: AblationRecord) -> Table:
    """A row for each setting that differs in some arm."""
    values = {name: theirs for arm in record.compared for name, (theirs, _) in arm.changes.items()}
    rows = [
        [name, *(show_value(arm.changes.get(name, (theirs, theirs))[1]) for arm in record.arms)]
        for name, theirs in values.items()
    ]
    return Table(("setting", *(arm.name for arm in record.arms)), rows)


def seeds_table(record: AblationRecord) -> Table:
    """The final loss of each run: a row for each seed."""
    columns = [["–" if run.failure else f"{run.loss:.4f}" for run in arm.runs] for arm in record.arms]
    rows = [*zip(map(str, record.seeds), *columns, strict=True)]
    return Table(("seed", *(arm.name for arm in record.arms)), rows)


def tried_table(record: AblationRecord) -> Table:
    """The tuned settings, and the loss of each."""
    rows = []
    for run in record.tried:
        loss = run.failure or significant(run.loss, 5)
        settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
        rows.append(
            (
                run.arm,
                settings,
                Markup('<span class="best">{}</span>').format(loss) if run.is_chosen else loss,
            )
        )
    return Table(("arm", "settings", "loss"), rows, numeric_from=2)
