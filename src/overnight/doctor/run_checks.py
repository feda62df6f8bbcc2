"""Does the learning rate go where it should? The schedule, drawn, and the peak beside others of its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from overnight.doctor.check import CheckResult
from overnight.training.schedule import ScheduleConfig

COLUMNS, ROWS = 60, 5
BLOCKS = " ▁▂▃▄▅▆▇█"
LOOKED_AT = 2_000  # steps at most
FLOOR_TOLERANCE = 0.02  # of the peak
# GPT-3 paper, table 2.1: 6e-4 for 768 channels, and for eight sizes from there to 12,288 the peak is 0.31 to
# 0.74 divided by the channels. Ten of those 0.46 / 768 still trained GPT-2 124M: repgpt's tuned 1e-2 is 17.
PEAK_TIMES_CHANNELS = 0.46
ANEW, FINE_TUNING = (0.1, 20.0), (0.001, 2.0)  # from how many of the usual to how many are sane

Rate = Callable[[int], float]
"""Step, counted from 0 -> learning rate."""


def check_schedule(
    rate: Rate, total_steps: int, schedule: ScheduleConfig, *, begins_anew: bool
) -> CheckResult:
    """The learning rate rises once, falls once, and has come to its floor when the run ends; drawn.

    `begins_anew`: the weights are drawn, and so need a warm-up.
    """
    count = min(total_steps, LOOKED_AT)
    steps = sorted({number * (total_steps - 1) // max(1, count - 1) for number in range(count)})
    rates = [rate(step) for step in steps]
    peak, last = max(rates), rates[-1]
    falls = math.ceil(total_steps / 5) if schedule.learning_rate_decay == "wsd" else total_steps
    tolerance = max(FLOOR_TOLERANCE, 2 / (schedule.decay_steps or falls))  # the last step is not yet the end
    floor = 1.0 if schedule.learning_rate_decay == "constant" else schedule.final_learning_rate_fraction
    faults = []
    if begins_anew and rates[0] > peak / 2:
        faults.append(
            f"it begins at {rates[0]:.2g}, the peak being {peak:.2g}: fresh weights need a warm-up, give "
            f"--warmup-steps {max(2, total_steps // 100)}"
        )
    if abs(last / peak - floor) > tolerance:
        faults.append(
            f"it ends at {last / peak:.0%} of its peak instead of {floor:.0%}: the fall is longer than the "
            "run, or does not come; look at decay_steps and total_steps, and whether steps are counted as "
            "micro-batches (schedule.py)"
        )
    top = rates.index(peak)
    if not (_rises(rates[: top + 1]) and _rises(rates[top:][::-1])):
        faults.append("it goes up and down more than once: look at schedule.py")
    return CheckResult(
        passed=not faults,
        measured=f"from {rates[0]:.2g} to {last:.2g}",
        bound=f"warm-up, peak, {floor:.0%} at the end",
        cause=f"the learning rate does not follow its schedule: {'; '.join(faults)}",
        shown=tuple(draw(rate, total_steps)),
        figures={"first": rates[0], "peak": peak, "last": last},
    )


def check_peak(peak: float, n_embd: int, *, begins_anew: bool) -> CheckResult:
    """The peak learning rate beside what GPT-3's table has for so many channels."""
    usual = PEAK_TIMES_CHANNELS / n_embd
    lowest, highest = (usual * times for times in (ANEW if begins_anew else FINE_TUNING))
    advice = (
        "training diverges or stays on a plateau" if peak > highest else "training hardly moves the weights"
    )
    return CheckResult(
        passed=lowest <= peak <= highest,
        measured=f"{peak:.2g}",
        bound=f"{lowest:.2g} to {highest:.2g} at {n_embd:,} channels",
        cause=f"peak_learning_rate={peak:.3g} is {peak / usual:.3g} times what GPT-3's table 2.1 has at "
        f"{n_embd:,} channels, about {usual:.1g}: {advice}; was a zero lost or added?",
        figures={"peak": peak, "usual": usual},
    )


def draw(rate: Rate, total_steps: int) -> list[str]:
    """The learning rate over the run, in characters: rows from the peak down to 0."""
    rates = [rate(number * (total_steps - 1) // (COLUMNS - 1)) for number in range(COLUMNS)]
    peak = max(rates)
    heights = [round(8 * ROWS * each / peak) for each in rates]
    lines = []
    for row in reversed(range(ROWS)):
        label = f"{peak:.2g}" if row == ROWS - 1 else "0" if row == 0 else ""
        bars = "".join(BLOCKS[min(8, max(0, height - 8 * row))] for height in heights)
        lines.append(f"{label:>8} │{bars}".rstrip())
    end = f"step {total_steps:,}"
    lines.append(f"{'':>8} └{'step 1':<{COLUMNS - len(end)}}{end}")
    return lines


def _rises(values: list[float]) -> bool:
    slack = 1e-9 * max(values)
    return all(after >= before - slack for before, after in zip(values, values[1:], strict=False))


# ---------------------------------------------------------------- is there enough of it? memory, disk, and how long it takes


def check_memory(needed_bytes: int, usable_bytes: int, device: str) -> CheckResult:
    """What a step takes, by `overnight plan`'s arithmetic, against what the device has for it."""
    return CheckResult(
        passed=needed_bytes <= usable_bytes,
        measured=f"{needed_bytes / 1e9:.2f} GB",
        bound=f"at most {usable_bytes / 1e9:.2f} GB usable",
        cause=f"a step does not fit into the memory of {device}: overnight plan says what would "
        "(--activation_checkpointing block, --loss chunked, fewer --micro-batch-size, more --processes)",
        figures={"needed_bytes": needed_bytes, "usable_bytes": usable_bytes},
    )


def check_disk(needed_bytes: Mapping[str, int], free_bytes: int) -> CheckResult:
    """What the run writes, by what it holds, against what is free."""
    needed = sum(needed_bytes.values())
    told = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count in needed_bytes.items() if count)
    return CheckResult(
        passed=needed <= free_bytes,
        measured=f"{needed / 1e9:.2f} GB",
        bound=f"at most {free_bytes / 1e9:.2f} GB free",
        cause=f"the disk of this folder is too small, and the run would end in the middle ({told}): free "
        "some, lower --keep-checkpoints, or work in a folder of a larger disk",
        figures={"needed_bytes": needed, "free_bytes": free_bytes} | dict(needed_bytes),
    )


def check_time(seconds: float, words: str, rests_on: str) -> CheckResult:
    """How long the run takes; there is no bound but that somebody can wait for it."""
    return CheckResult(
        passed=math.isfinite(seconds) and seconds > 0,
        measured=f"about {words}",
        bound=rests_on,
        cause="how long the run takes can't be told: the machine was not to be measured; see overnight plan",
        figures={"seconds": seconds},
    )
