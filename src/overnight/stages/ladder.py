"""The command `overnight ladder`: a training step, faster rung by rung, on this machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from overnight import __version__
from overnight.terminal import say

if TYPE_CHECKING:  # --help is shown without torch
    from overnight.report.ladder import LadderRecord, RungRecord
    from overnight.stages.ladder_plan import LadderPlan
    from overnight.stages.rungs import Rung
    from overnight.stages.turns import Turn

COLUMNS = 80
BUSY_SHARE = 0.5  # of all processors kept busy by others: from there on the figures are noisy


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """One change after another, from plain float32 to everything: each is timed, and held against float32."""

    model: str = "gpt2-124m"
    """A published size: gpt2-124m, gpt2-350m, ..., gpt3-125m, ..."""
    rungs: tuple[str, ...] | None = None
    """Which, in this order, above float32: tf32, bf16, fp16, compile, fused-attention, block-attention,
    nice-numbers, fused-adamw, large-pages, micro-batch, and, when they are named only, chunked-head,
    fp8-head, recompute. All that make sense here if left out."""
    rows: int | None = None
    """Rows of a micro-batch; 1 on the CPU, elsewhere as many as fit, at most 16, if left out."""
    context_length: int | None = None
    """Tokens of a row; the model's if left out."""
    steps: int | None = None
    """Timed steps of each rung, after two to warm up; 3 on the CPU and 5 elsewhere if left out."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    data: str | None = None
    """Text in GPT-2's tokens: a prepared folder, or a source; Python's documentation if left out."""
    out: str | None = None
    """A folder for ladder.json, ladder.md and ladder.svg; none is written if left out."""
    json: bool = False
    """Print one JSON object to standard output."""


def run(config: LadderConfig) -> LadderRecord:
    """Measure, show, write. Raises FloatingPointError in the end if a rung computes something else."""
    from overnight.report.drawing import check_matplotlib
    from overnight.report.ladder import as_json, wrong_rungs
    from overnight.report.ladder_table import ladder_text
    from overnight.stages.ladder_plan import plan_ladder
    from overnight.world import open_world

    if config.out is not None:
        check_matplotlib()  # the drawing comes last: minutes from here
        if Path(config.out).is_file():
            raise ValueError(f"--out {config.out} is a file; name a folder")
    ladder = measure(plan_ladder(config, open_world(config.device).device))
    say(ladder_text(ladder, shutil.get_terminal_size().columns))  # 80 where there is no terminal
    if config.json:
        sys.stdout.write(json.dumps(as_json(ladder), indent=2) + "\n")
    if config.out is not None:
        write(ladder, Path(config.out))
    say(f"next: overnight train {config.model}")
    if wrong := wrong_rungs(ladder):
        raise FloatingPointError(
            f"{', '.join(wrong)}: the losses differ from float32's by more than rounding explains; "
            "do not train with these settings on this machine"
        )
    return ladder


class Climbed(NamedTuple):
    """What one rung did in its group's rounds, and what the rung before it did in the same."""

    turns: list[Turn]
    turns_before: list[Turn]
    """None for the first rung."""


def measure(plan: LadderPlan) -> LadderRecord:
    """Let the rungs step in turn, and put together what that shows."""
    import numpy as np

    from overnight.stages.ladder_plan import WARM_UPS, find_peak_flops_or_measure, read_ids
    from overnight.stages.turns import at_work, take_turns

    ids, origin = read_ids(plan)
    announce(plan, origin)
    climbed: dict[str, Climbed] = {}
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ids.npy"
        np.save(place, ids)
        for group in plan.groups:
            rounds = []
            with at_work({name: replace(plan.tasks[name], ids=str(place)) for name in group}) as processes:
                for turns in take_turns(processes, plan.steps, WARM_UPS, plan.ground.tokens_per_step):
                    rounds.append(turns)
                    rates.append(find_peak_flops_or_measure(plan.machine.device, plan.precision))
            climbed = pair_up(group, rounds) | climbed
    return build_record(plan, climbed, statistics.median(rates), origin)


def pair_up(group: Sequence[str], rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Climbed]:
    """Each rung's turns beside those of the rung before it in the same group."""
    turns = {name: [each[name] for each in rounds] for name in group}
    before = dict(zip(group[1:], group, strict=False))
    return {name: Climbed(turns[name], turns[before[name]] if name in before else []) for name in group}


def announce(plan: LadderPlan, origin: str) -> None:
    """Say what each rung is, which are skipped, and how long all of it will take."""
    from overnight.report.words import duration
    from overnight.stages.ladder_plan import estimate_seconds

    say(f"{plan.model_name} in training, each rung on top of those before it:")
    wide = max(len(rung.name) for rung in plan.climb.rungs)
    for rung in plan.climb.rungs:
        skipped = plan.climb.skipped.get(rung.name)
        say(f"  {rung.name:<{wide}}  {f'skipped: {skipped}' if skipped else rung.about}")
    if len(plan.groups) > 1:
        groups = ", then ".join(f"{group[0]} to {group[-1]}" for group in plan.groups)
        say(textwrap.fill(f"As many take turns as memory holds: {groups}.", COLUMNS))
    seconds = estimate_seconds(plan)
    say(f"{plan.rounds} rounds on {origin}, about {duration(seconds)}.")
    if (load := os.getloadavg()[0]) > BUSY_SHARE * (os.cpu_count() or 1):
        say(f"The machine has other work (load {load:.1f}), so expect noise.")
    say()


def build_record(
    plan: LadderPlan, climbed: Mapping[str, Climbed], peak_flops: float, origin: str
) -> LadderRecord:
    """The ladder as it was climbed; `peak_flops` is what MFU is to be a share of."""
    from overnight.hardware import find_device_name
    from overnight.report.ladder import LadderRecord
    from overnight.stages.ladder_plan import about_peak

    ground = plan.ground
    rows, tokens = ground.rows_per_step, ground.tokens_per_step
    return LadderRecord(
        model=plan.model_name,
        device_name=find_device_name(plan.machine.device),
        tokens_per_step=tokens,
        about_step=f"a step of {rows} x {ground.model.context_length:,} = {tokens:,} tokens",
        flops_per_token=ground.model.flops_per_token(),
        peak_flops=peak_flops,
        about_peak=about_peak(plan.machine.device, plan.precision),
        rungs=tuple(build_rung(rung, plan, climbed) for rung in plan.climb.rungs),
        groups=tuple(map(tuple, plan.groups)),
        environment={"text": origin, **describe_software()},
    )


def build_rung(rung: Rung, plan: LadderPlan, climbed: Mapping[str, Climbed]) -> RungRecord:
    """One rung of it."""
    from overnight.report.ladder import RungRecord
    from overnight.stages.ladder_plan import WARM_UPS
    from overnight.stages.rungs import tolerance

    if rung.name in plan.climb.skipped:
        return RungRecord(name=rung.name, about=rung.about, skipped=plan.climb.skipped[rung.name])
    turns, before = climbed[rung.name]
    peaks = [turn.peak_bytes for turn in turns[WARM_UPS:] if turn.peak_bytes is not None]
    return RungRecord(
        name=rung.name,
        about=rung.about,
        settings=plan.tasks[rung.name].settings(),
        tolerance=tolerance(plan.tasks[rung.name]),
        milliseconds=tuple(turn.milliseconds for turn in turns[WARM_UPS:]),
        milliseconds_before=tuple(turn.milliseconds for turn in before[WARM_UPS:]),
        losses=tuple(loss for turn in turns for loss in turn.losses),
        peak_bytes=max(peaks, default=None),
    )


def describe_software() -> dict[str, object]:
    """Versions, threads, date, and how busy the machine is."""
    import torch

    return {
        "overnight": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write(ladder: LadderRecord, folder: Path) -> None:
    """ladder.json, ladder.md and ladder.svg; what is there already is replaced."""
    from overnight.report.ladder import as_json
    from overnight.report.ladder_plot import ladder_svg
    from overnight.report.ladder_table import ladder_markdown
    from overnight.run_directory import write_atomically

    write_atomically(folder / "ladder.json", json.dumps(as_json(ladder), indent=2) + "\n")
    write_atomically(folder / "ladder.md", ladder_markdown(ladder))
    write_atomically(folder / "ladder.svg", ladder_svg(ladder))
    say(f"wrote ladder.json, ladder.md and ladder.svg into {folder}")
