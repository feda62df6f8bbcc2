"""The results of a campaign as a text of 80 columns, and as a self-contained page with plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from overnight.ablation.paired import PairedDifference
from overnight.ablation.results import AblationRecord, ArmResult
from overnight.report.html import render, show_value
from overnight.report.page import Table
from overnight.report.plots import (
    MUTED,
    comparison_chart,
    in_box,
    new_chart,
    run_style,
)
from overnight.report.run_data import read_run
from overnight.terminal import duration, short, significant, wrap

COLUMNS = 80
LONGEST_NAME = 22
ROW, WIDTH = 44, 880
MARGINS = (14, 132, 40, 240)
"""Of the chart of differences, in CSS pixels: top, right, bottom, left."""


class Row(NamedTuple):
    """An arm's figures as text."""

    name: str
    loss: str
    difference: str
    interval: str
    verdict: str
    bits: str
    parameters: str
    flops: str
    step_time: str
    seeds_to_tell: str


def ablation_text(record: AblationRecord) -> str:
    """The two tables and the sentences, at most 80 columns wide."""
    rows = [as_row(record, arm, LONGEST_NAME) for arm in record.arms]
    width = max(len("arm"), *(len(row.name) for row in rows))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("overnight.ablation"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short}
    text = environment.get_template("ablation.txt").render(
        record=record, rows=rows, width=width, sentences=[*sentences(record)]
    )
    lines = [
        line if line.startswith(" ") or len(line) <= COLUMNS else "\n".join(wrap(line, COLUMNS))
        for line in text.splitlines()
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_row(record: AblationRecord, arm: ArmResult, longest: int = 1000) -> Row:
    """The figures of an arm; a dash where there is none."""
    difference, is_baseline = arm.nats_difference, arm is record.arms[0]
    name = arm.name if len(arm.name) <= longest else f"{arm.name[: longest - 1]}…"
    return Row(
        name=name,
        loss="–" if arm.loss is None else f"{arm.loss:.4f}",
        difference="–" if difference is None else f"{difference.mean:+.4f}",
        interval=interval_text(difference),
        verdict="baseline" if is_baseline else verdict_text(difference),
        bits="–" if arm.bits_difference is None else f"{arm.bits_difference.mean:+.4f}",
        parameters=short(arm.parameters),
        flops=short(arm.flops_per_token),
        step_time="–" if arm.step_time_ratio is None else f"{arm.step_time_ratio:.2f}x",
        seeds_to_tell="–"
        if not difference or not difference.seeds_to_tell
        else f"{difference.seeds_to_tell:,}",
    )


def interval_text(difference: PairedDifference | None) -> str:
    """The ends of the interval; a dash if there is none."""
    if difference is None or difference.low is None or difference.high is None:
        return "–"
    return f"{difference.low:+.4f} to {difference.high:+.4f}"


def verdict_text(difference: PairedDifference | None) -> str:
    """The verdict, or why there is none."""
    if difference is None:
        return "no pair"
    return difference.verdict or "one seed: none"


def sentences(record: AblationRecord) -> Iterator[str]:
    """What a reader must know besides the figures."""
    count, baseline = len(record.compared), record.arms[0].name
    if count == 1:
        yield (
            "One comparison was made. Of twenty without any difference, one is called better or worse by "
            "chance."
        )
    else:
        yield (
            f"{count} comparisons were made, each with an interval of its own. Of twenty without any "
            f"difference, one is called better or worse by chance: expect {count / 20:g} such calls here."
        )
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
            f"{name} reached the final loss of {other} after {short(tokens)} of {short(total_tokens)} "
            f"tokens ({tokens / total_tokens:.0%}{time})"
        )
    yield f"{'; '.join(parts)}."


def ablation_page(record: AblationRecord) -> str:
    """The page as HTML. Raises ValueError if matplotlib is not installed."""
    rows = [as_row(record, arm) for arm in record.arms]
    drawn = [
        (number, arm.name, read_run(run.directory.path))
        for number, arm in enumerate(record.arms)
        for run, final in zip(arm.runs, arm.finals, strict=True)
        if final.failure is None
    ]
    drawn = [each for each in drawn if each[2].steps >= 2]
    names = [name if drawn[at - 1][1] != name or not at else "" for at, (_, name, _) in enumerate(drawn)]
    charts = [number for number, _, _ in drawn]
    return render(
        "ablation.html",
        package="overnight.ablation",
        title=f"Ablation {record.name}",
        record=record,
        results=Table(
            ("arm", "loss", "difference", "95% interval", "bits/byte", "verdict", "seeds to tell"),
            [
                (row.name, row.loss, row.difference, row.interval, row.bits, row.verdict, row.seeds_to_tell)
                for row in rows
            ],
        ),
        costs=Table(
            ("arm", "parameters", "FLOPs per token", "time of a step"),
            [(row.name, row.parameters, row.flops, row.step_time) for row in rows],
        ),
        sentences=[*sentences(record)],
        losses=comparison_chart([run for _, _, run in drawn], names, charts) if drawn else None,
        differences=difference_chart(record) if any(arm.nats_difference for arm in record.compared) else None,
        changes=changes_table(record),
        by_seed=seeds_table(record),
        tried=tried_table(record),
    )


def difference_chart(record: AblationRecord) -> Markup:
    """For each arm its mean difference and interval as a bar, and a dot for each seed; a line at 0."""
    arms = [arm for arm in record.compared if arm.nats_difference]
    description = "Differences from the baseline, nats per token"
    top, _, bottom, _ = MARGINS
    with new_chart(description, (WIDTH, top + bottom + ROW * len(arms)), MARGINS) as (figure, axes):
        for number, arm in enumerate(arms):
            colour = run_style(record.arms.index(arm))["color"]
            found = arm.nats_difference
            assert found is not None
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [number, number], color=colour, linewidth=7, alpha=0.25)
            axes.plot(found.values, np.full(len(found.values), number), "o", color=colour, markersize=3.5)
            axes.plot([found.mean], [number], "|", color=colour, markersize=20, markeredgewidth=2.5)
            name = as_row(record, arm, LONGEST_NAME).name
            axes.annotate(
                name,
                (0, number),
                (-12, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
            )
            axes.annotate(
                verdict_text(found),
                (1, number),
                (12, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0), max(high, 0))
        if axes.get_xlim()[0] >= axes.get_xlim()[1] - 1e-12:
            axes.set_xlim(-1e-3, 1e-3)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.grid(visible=False)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="x", pad=7)
        return in_box(figure, description)


def changes_table(record: AblationRecord) -> Table:
    """A row for each setting that differs in some arm."""
    names = dict.fromkeys(name for arm in record.compared for name in arm.changes)
    rows = []
    for name in names:
        theirs = next(arm.changes[name][0] for arm in record.compared if name in arm.changes)
        mine = [show_value(arm.changes.get(name, (theirs, theirs))[1]) for arm in record.compared]
        rows.append([name, show_value(theirs), *mine])
    return Table(("setting", *(arm.name for arm in record.arms)), rows)


def seeds_table(record: AblationRecord) -> Table:
    """The final loss of each run: a row for each seed."""
    rows = [
        [
            str(seed),
            *("–" if arm.finals[at].failure else f"{arm.finals[at].loss:.4f}" for arm in record.arms),
        ]
        for at, seed in enumerate(record.seeds)
    ]
    return Table(("seed", *(arm.name for arm in record.arms)), rows)


def tried_table(record: AblationRecord) -> Table:
    """The tuned settings, and the loss of each."""
    rows: list[Sequence[object]] = []
    for each in record.tried:
        settings = ", ".join(f"{name} {significant_setting(value)}" for name, value in each.settings.items())
        loss = each.final.failure or significant(each.final.loss, 5)
        chosen = Markup('<span class="best">{}</span>').format(loss) if each.is_chosen else loss
        rows.append((each.arm, settings, chosen))
    return Table(("arm", "settings", "loss"), rows, numeric_from=2)


def significant_setting(value: object) -> str:
    """A tuned value as it is written on the command line."""
    return f"{value:g}" if isinstance(value, float) else show_value(value)
