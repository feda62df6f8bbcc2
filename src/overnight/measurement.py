"""What this process does on this machine, measured: its memory, and how fast it multiplies matrices."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SIDE_ON_CPU, SIDE_ON_DEVICE = 2048, 8192


def synchronize(device: str) -> None:
    """Return once `device` has done all it was told to: before a clock is read."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: str) -> None:
    """Forget the peak so far. Where a CPU's operating system can't (other than Linux), nothing happens."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif device == "cpu" and CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5", encoding="ascii")  # man 5 proc: resets the peak resident set size


def peak_memory_bytes(device: str) -> int | None:
    """The most memory taken since the last reset; None where the device does not say (Apple's GPUs).

    Of a GPU what tensors took; of a CPU what the whole process, its libraries included, had resident.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if device != "cpu":
        return None
    if STATUS.exists():
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def release_cached_memory(device: str) -> None:
    """Give back what torch keeps of a GPU's memory for later, so that other processes find it."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def measure_matmul_flops(device: str, precision: str, repeats: int = 5) -> float:
    """FLOP/s of a large square product in fp32, tf32, bf16 or fp16: the median of `repeats`, after two more.

    What a training step can be held against where the maker publishes no peak. Leaves torch's setting
    for float32 products as it was.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = SIDE_ON_CPU if device == "cpu" else SIDE_ON_DEVICE
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        seconds = [_time(lambda: left @ right, device) for _ in range(repeats + 2)][2:]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * side**3 / statistics.median(seconds)


def _time(action: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started_at = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started_at
