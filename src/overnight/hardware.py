"""Facts about devices: peak arithmetic, memory, bandwidth, and which precision they compute natively.

Peaks are the manufacturers' dense figures (no structured sparsity) with float32 accumulation; a device whose
maker publishes none has no peak, and nothing derived from it (MFU, plans) is reported.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Precision = Literal["bf16", "fp16", "tf32", "fp32"]

SHORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of products; other precisions use float32
GB = 10**9
CPUINFO = Path("/proc/cpuinfo")  # Linux's
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Device(NamedTuple):
    """A row of the table of published figures.

    Precisions are peak TFLOP/s, None where the device has no such unit or its maker publishes no rate.
    """

    name: str
    """The name a user types."""
    pattern: str
    """A regular expression for the driver's name."""
    bf16: float | None = None
    fp16: float | None = None
    tf32: float | None = None
    fp32: float | None = None
    memory_gb: int | None = None
    """None where the device shares the machine's memory."""
    gb_per_second: float | None = None

    @property
    def native(self) -> Precision:
        """The fastest precision for matrix products; see `native_precision`."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def memory_bytes(self) -> int | None:
        """None where the device shares the machine's memory."""
        return self.memory_gb and self.memory_gb * GB

    def peak_flops(self, precision: Precision) -> float | None:
        """Peak dense FLOP/s in a precision; None where the rate is unknown."""
        teraflops: float | None = getattr(self, precision)
        return teraflops and teraflops * 1e12

    @property
    def bytes_per_second(self) -> float | None:
        """Bandwidth of the memory."""
        return self.gb_per_second and self.gb_per_second * GB


# The first row whose pattern is found in a name is the device's. NVIDIA's sheets print most tensor-core
# figures "with sparsity"; half of those is the dense rate given here.
DEVICES = (
    # name, pattern, TFLOP/s in bf16, fp16, tf32 and fp32, GB of memory, GB/s of bandwidth
    # HGX and DGX B200 data sheets, an eighth of the eight-GPU board's figures.
    Device("b200", r"\bB200\b", 2250, 2250, 1125, 75, 180, 8000),
    # H200 and H100 data sheets, columns SXM, NVL and PCIe.
    Device("h200-nvl", r"\bH200 NVL\b", 835, 835, 417, 60, 141, 4800),
    Device("h200", r"\bH200\b", 989, 989, 494, 67, 141, 4800),
    Device("h100-nvl", r"\bH100 NVL\b", 835, 835, 417, 60, 94, 3900),
    Device("h100-pcie", r"\bH100 PCIe\b", 756, 756, 378, 51, 80, 2000),
    Device("h100", r"\bH100\b.*\b(HBM3|SXM5?)\b", 989, 989, 494, 67, 80, 3350),
    # A100 data sheet.
    Device("a100-pcie-80gb", r"\bA100.PCI[Ee].80GB\b|\bA100 80GB PCIe\b", 312, 312, 156, 19.5, 80, 1935),
    Device("a100-80gb", r"\bA100.*80GB\b", 312, 312, 156, 19.5, 80, 2039),
    Device("a100-40gb", r"\bA100.*40GB\b", 312, 312, 156, 19.5, 40, 1555),
    # L40S and L4 data sheets.
    Device("l40s", r"\bL40S\b", 362, 362, 183, 91.6, 48, 864),
    Device("l4", r"\bL4\b", 121, 121, 60, 30.3, 24, 300),
    # Ada and GA102 architecture papers, appendix A: the rates with float32 accumulation.
    Device("rtx-4090", r"\bRTX 4090$", 165.2, 165.2, 82.6, 82.6, 24, 1008),
    Device("rtx-3090", r"\bRTX 3090$", 71, 71, 35.6, 35.6, 24, 936),
    # V100 and T4 data sheets.
    Device("v100-16gb", r"\bV100-SXM2-16GB\b", None, 125, None, 15.7, 16, 900),
    Device("v100-32gb", r"\bV100-SXM2-32GB\b", None, 125, None, 15.7, 32, 900),
    Device("v100-pcie-16gb", r"\bV100-PCIE-16GB\b", None, 112, None, 14, 16, 900),
    Device("v100-pcie-32gb", r"\bV100-PCIE-32GB\b", None, 112, None, 14, 32, 900),
    Device("t4", r"\bT4\b", None, 65, None, 8.1, 16, 320),
    # Apple's announcements of 2020 to 2024. It has published no rate since the M2; the bandwidths of the
    # M3 Max and the M4 Max depend on how many cores were bought.
    Device("m1", r"^Apple M1$", fp32=2.6, gb_per_second=68.25),
    Device("m1-pro", r"^Apple M1 Pro$", fp32=5.2, gb_per_second=200),
    Device("m1-max", r"^Apple M1 Max$", fp32=10.4, gb_per_second=400),
    Device("m1-ultra", r"^Apple M1 Ultra$", fp32=21, gb_per_second=800),
    Device("m2", r"^Apple M2$", fp32=3.6, gb_per_second=100),
    Device("m2-pro", r"^Apple M2 Pro$", gb_per_second=200),
    Device("m2-max", r"^Apple M2 Max$", gb_per_second=400),
    Device("m2-ultra", r"^Apple M2 Ultra$", gb_per_second=800),
    Device("m3", r"^Apple M3$", gb_per_second=100),
    Device("m3-pro", r"^Apple M3 Pro$", gb_per_second=150),
    Device("m3-max", r"^Apple M3 Max$"),
    Device("m4", r"^Apple M4$", gb_per_second=120),
    Device("m4-pro", r"^Apple M4 Pro$", gb_per_second=273),
    Device("m4-max", r"^Apple M4 Max$"),
)
BRANDS = re.compile(r"\b(nvidia|geforce|rtx|tesla|apple)-")


def find_device(name: str) -> Device | None:
    """The row of a device, by its driver's name or the table's; None if there is none.

    In the table's names the brand is optional and case does not matter: 4090, RTX 4090.
    """
    typed = BRANDS.sub("", re.sub(r"[\s_-]+", "-", name.strip().lower()))
    called = (device for device in DEVICES if BRANDS.sub("", device.name) == typed)
    driven = (device for device in DEVICES if re.search(device.pattern, name))
    return next(called, None) or next(driven, None)


def find_peak_flops(device: str, precision: Precision) -> float | None:
    """Peak dense FLOP/s of a torch device in a precision; None where it is unknown.

    None for every CPU, also those of Apple's chips, whose GPU has the same name.
    """
    found = None if device == "cpu" else find_device(find_device_name(device))
    return found and found.peak_flops(precision)


def find_device_name(device: str) -> str:
    """The name of a torch device ("cpu", "cuda:1", "mps") as its driver or operating system gives it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if platform.system() == "Darwin":  # the GPU of an Apple chip has the chip's name
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    cpuinfo = CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def native_precision(device: str) -> Literal["bf16", "fp16", "fp32"]:
    """bf16 where the device multiplies bfloat16 matrices in hardware, else fp16 where it does, else fp32.

    A CPU has bfloat16 with AMX tiles (Intel, since 2023) or AVX512-BF16 (AMD, since 2022), an NVIDIA GPU
    since compute capability 8.0 (2020), and float16 alone since 7.0 (V100, T4). Elsewhere torch emulates
    them, slower than float32. Apple's GPUs train in fp32.
    """
    if device == "cpu":
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if has_bf16 else "fp32"
    if not device.startswith("cuda"):
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"


def find_memory_bytes(device: str) -> int:
    """Bytes of memory that a process may use on a torch device, in use or not."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device == "mps":
        return int(torch.mps.recommended_max_memory())
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text(encoding="ascii").strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])  # "max": no limit


# ---------------------------------------------------------------- measurements

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SIDE_ON_CPU, SIDE_ON_DEVICE = 2048, 8192


def synchronize(device: str) -> None:
    """Wait until `device` has finished all queued work; call it before reading a clock."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: str) -> None:
    """Reset the peak of memory use. On a CPU, works on Linux only."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif device == "cpu" and CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5", encoding="ascii")  # man 5 proc: resets the peak resident set size


def peak_memory_bytes(device: str) -> int | None:
    """The peak of memory use since the last reset; None for Apple's GPUs, which do not report it.

    On a GPU the memory of tensors; on a CPU the resident memory of the whole process, with its libraries.
    """
    if device.startswith("cuda"):
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
    """Return the GPU memory that torch caches, so that other processes can use it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def measure_matmul_flops(device: str, precision: str, repeats: int = 5) -> float:
    """FLOP/s of a large square product in fp32, tf32, bf16 or fp16: the median of `repeats`, after two more.

    The reference for a training step where the maker publishes no peak. Restores torch's setting for float32
    products.
    """
    dtype = SHORT_DTYPES.get(precision, torch.float32)
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
    """Seconds of one call, including the device's work."""
    synchronize(device)
    started_at = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started_at
