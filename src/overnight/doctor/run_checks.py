"""Checks of the whole run: learning-rate schedule, memory, disk, duration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from overnight.distributed.launcher import count_cores
from overnight.doctor.check import CheckResult
from overnight.doctor.context import DoctorContext
from overnight.planning.plan import quick_forecast
from overnight.terminal import byte_size, duration
from overnight.training import MATRIX_LEARNING_RATE
from overnight.training.memory import USABLE_FRACTION

DRAWN_COLUMNS, DRAWN_ROWS = 60, 5
BLOCKS = " ▁▂▃▄▅▆▇█"
SAMPLED_STEPS = 2_000
FLOOR_TOLERANCE = 0.02  # of the peak
# GPT-3 paper, table 2.1: 6e-4 for 768 channels, and for eight sizes from there to 12,288 the peak is 0.31 to
# 0.74 divided by the channels. GPT-2 124M still trained at 17 times 0.46 / 768 (repgpt's tuned 1e-2).
PEAK_TIMES_CHANNELS = 0.46
PRETRAINING, FINE_TUNING = (0.1, 20.0), (0.001, 2.0)  # plausible multiples of the usual peak
MATRIX_RATES = (0.05, 5.0)  # plausible multiples of Muon's usual rate
BUSY = 1.5  # load average per core; this command itself counts as one


def check_schedule(context: DoctorContext) -> CheckResult:
    """The learning rate rises once, falls once, and reaches its final value at the end of the run."""
    config, rate = context.schedule.config, context.schedule.learning_rate
    total_steps = context.schedule.total_steps
    count = min(total_steps, SAMPLED_STEPS)
    steps = sorted({number * (total_steps - 1) // max(1, count - 1) for number in range(count)})
    rates = [rate(step) for step in steps]
    peak, last = max(rates), rates[-1]
    falls = math.ceil(total_steps / 5) if config.learning_rate_decay == "wsd" else total_steps
    tolerance = max(FLOOR_TOLERANCE, 2 / (config.decay_steps or falls))  # the end is after the last step
    floor = 1.0 if config.learning_rate_decay == "constant" else config.final_learning_rate_fraction
    faults = []
    if context.is_pretraining and rates[0] > peak / 2:
        faults.append(
            f"it starts at {rates[0]:.2g}, with a peak of {peak:.2g}: random weights need a warm-up, give "
            f"--warmup-steps {max(2, total_steps // 100)}"
        )
    if abs(last / peak - floor) > tolerance:
        faults.append(
            f"it ends at {last / peak:.0%} of its peak instead of {floor:.0%}: the decay is longer than the "
            "run, or missing; look at decay_steps and total_steps, and whether micro-batches are counted as "
            "steps (schedule.py)"
        )
    pairs = itertools.pairwise(rates)
    rises = [after > before for before, after in pairs if abs(after - before) > 1e-9 * peak]
    if rises != sorted(rises, reverse=True):
        faults.append("it goes up and down more than once: look at schedule.py")
    return CheckResult(
        passed=not faults,
        measured=f"from {rates[0]:.2g} to {last:.2g}",
        bound=f"warm-up, peak, {floor:.0%} at the end",
        cause=f"the learning rate does not follow its schedule: {'; '.join(faults)}",
        shown=tuple(draw(rate, total_steps)),
        figures={"first": rates[0], "peak": peak, "last": last},
    )


def check_peak(context: DoctorContext) -> CheckResult:
    """The peak learning rate is near the one in GPT-3's table for this number of channels.

    So is Muon's near the published one, which does not depend on the number of channels.
    """
    optimizer, channels = context.recipe.optimizer, context.sizes.n_embd
    peak = optimizer.peak_learning_rate
    usual = PEAK_TIMES_CHANNELS / channels
    lowest, highest = (usual * times for times in (PRETRAINING if context.is_pretraining else FINE_TUNING))
    faults = []
    if not lowest <= peak <= highest:
        faults.append(
            f"peak_learning_rate={peak:.3g} is {peak / usual:.3g} times that of GPT-3's table 2.1 at "
            f"{channels:,} channels, about {usual:.1g}: {_effect(peak > highest)}"
        )
    result = CheckResult(
        passed=not faults,
        measured=f"{peak:.2g}",
        bound=f"{lowest:.2g} to {highest:.2g} at {channels:,} channels",
        figures={"peak": peak, "usual": usual},
    )
    if optimizer.optimizer == "muon":
        rate = optimizer.matrix_rate
        least, most = (MATRIX_LEARNING_RATE * times for times in MATRIX_RATES)
        if not least <= rate <= most:
            faults.append(
                f"matrix_learning_rate={rate:.3g} is {rate / MATRIX_LEARNING_RATE:.3g} times Muon's usual "
                f"one, {MATRIX_LEARNING_RATE:.2g}: {_effect(rate > most)}"
            )
        result = dataclasses.replace(
            result,
            measured=f"{peak:.2g}, matrices {rate:.2g}",
            bound=f"{result.bound}; {least:.2g} to {most:.2g}",
            figures={**result.figures, "matrix_rate": rate},
        )
    cause = f"{'; '.join(faults)}; check its decimal places"
    return dataclasses.replace(result, passed=not faults, cause=cause)


def _effect(is_high: bool) -> str:
    return "training diverges or stays on a plateau" if is_high else "the weights hardly change"


def draw(rate: Callable[[int], float], total_steps: int) -> list[str]:
    """The learning rate over the run as a bar chart in characters, from 0 to the peak."""
    rates = [rate(number * (total_steps - 1) // (DRAWN_COLUMNS - 1)) for number in range(DRAWN_COLUMNS)]
    peak = max(rates)
    heights = [round(8 * DRAWN_ROWS * each / peak) for each in rates]
    lines = []
    for row in reversed(range(DRAWN_ROWS)):
        label = f"{peak:.2g}" if row == DRAWN_ROWS - 1 else "0" if row == 0 else ""
        bars = "".join(BLOCKS[min(8, max(0, height - 8 * row))] for height in heights)
        lines.append(f"{label:>8} │{bars}".rstrip())
    end = f"step {total_steps:,}"
    lines.append(f"{'':>8} └{'step 1':<{DRAWN_COLUMNS - len(end)}}{end}")
    return lines


def check_memory(context: DoctorContext) -> CheckResult:
    """The estimated memory of a step is at most the usable memory of the device."""
    plan = context.plan
    needed, usable = plan.memory.together, int(USABLE_FRACTION * (plan.device_memory_bytes or 0))
    return CheckResult(
        passed=needed <= usable,
        measured=byte_size(needed),
        bound=f"at most {byte_size(usable)} usable",
        cause=f"a step does not fit into the memory of {plan.device_name}: see overnight plan for what fits "
        "(--activation-checkpointing block, --loss chunked, smaller --micro-batch-size, more --processes)",
        figures={"needed_bytes": needed, "usable_bytes": usable},
    )


def check_disk(context: DoctorContext) -> CheckResult:
    """What the run writes is at most what is free."""
    plan = context.plan
    needed, free = sum(plan.new_disk_bytes.values()), plan.disk_free_bytes or 0
    uses = ", ".join(f"{use} {byte_size(count)}" for use, count in plan.new_disk_bytes.items() if count)
    return CheckResult(
        passed=needed <= free,
        measured=byte_size(needed),
        bound=f"at most {byte_size(free)} free",
        cause=f"the disk of this folder is too small, and the run would stop midway ({uses}): free space, "
        "lower --keep-checkpoints, or run in a folder on a larger disk",
        figures={"needed_bytes": needed, "free_bytes": free} | plan.new_disk_bytes,
    )


def check_time(context: DoctorContext) -> CheckResult:
    """The predicted duration of the run; it has no bound."""
    plan = context.plan
    seconds, basis = quick_forecast(plan)
    if plan.load_average > BUSY * (count_cores() or 1):
        basis = f"{basis}; the machine is busy: load {plan.load_average:.1f}"
    return CheckResult(
        passed=math.isfinite(seconds) and seconds > 0,
        measured=f"about {duration(seconds)}",
        bound=basis,
        cause="the duration can't be predicted: no speed was measured; see overnight plan",
        figures={"seconds": seconds},
    )
