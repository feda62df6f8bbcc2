"""Facts about devices: peak arithmetic, memory, bandwidth, and which precision they compute natively.

Peaks are the manufacturers' dense figures (no structured sparsity) with float32 accumulation; a device whose
maker publishes none is unknown, never guessed, and then nothing derived from it (MFU, plans) is reported.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["bf16", "fp16", "tf32", "fp32"]

GB = 10**9
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the maker publishes. Precisions are peak TFLOP/s, None where the device has no such unit."""

    bf16: float | None = None
    fp16: float | None = None
    tf32: float | None = None
    fp32: float
    memory_bytes: int | None = None
    """None where the device shares the machine's memory."""
    bytes_per_second: float


def _tensor_cores(
    sixteen_bit: float, tf32: float, fp32: float, memory_gb: int, gb_per_second: float
) -> DeviceFacts:
    """An NVIDIA device since Ampere: bf16 and fp16 at the same rate."""
    return DeviceFacts(
        bf16=sixteen_bit,
        fp16=sixteen_bit,
        tf32=tf32,
        fp32=fp32,
        memory_bytes=memory_gb * GB,
        bytes_per_second=gb_per_second * GB,
    )


# Pattern searched in the device's name -> facts; the first that matches. NVIDIA's sheets print most
# tensor-core figures "with sparsity"; half of those is the dense rate given here.
DEVICES: tuple[tuple[str, DeviceFacts], ...] = (
    # HGX and DGX B200 data sheets, an eighth of the eight-GPU board's figures.
    (r"\bB200\b", _tensor_cores(2250, 1125, 75, 180, 8000)),
    # H200 and H100 data sheets, columns SXM, NVL and PCIe.
    (r"\bH200 NVL\b", _tensor_cores(835, 417, 60, 141, 4800)),
    (r"\bH200\b", _tensor_cores(989, 494, 67, 141, 4800)),
    (r"\bH100 NVL\b", _tensor_cores(835, 417, 60, 94, 3900)),
    (r"\bH100 PCIe\b", _tensor_cores(756, 378, 51, 80, 2000)),
    (r"\bH100\b.*\b(HBM3|SXM5?)\b", _tensor_cores(989, 494, 67, 80, 3350)),
    # A100 data sheet.
    (r"\bA100.PCI[Ee].80GB\b|\bA100 80GB PCIe\b", _tensor_cores(312, 156, 19.5, 80, 1935)),
    (r"\bA100.*80GB\b", _tensor_cores(312, 156, 19.5, 80, 2039)),
    (r"\bA100.*40GB\b", _tensor_cores(312, 156, 19.5, 40, 1555)),
    # L40S and L4 data sheets.
    (r"\bL40S\b", _tensor_cores(362, 183, 91.6, 48, 864)),
    (r"\bL4\b", _tensor_cores(121, 60, 30.3, 24, 300)),
    # Ada and GA102 architecture papers, appendix A: the rates with float32 accumulation.
    (r"\bRTX 4090$", _tensor_cores(165.2, 82.6, 82.6, 24, 1008)),
    (r"\bRTX 3090$", _tensor_cores(71, 35.6, 35.6, 24, 936)),
    # V100 and T4 data sheets: tensor cores for fp16 only.
    (r"\bV100-SXM2-16GB\b", DeviceFacts(fp16=125, fp32=15.7, memory_bytes=16 * GB, bytes_per_second=900e9)),
    (r"\bV100-SXM2-32GB\b", DeviceFacts(fp16=125, fp32=15.7, memory_bytes=32 * GB, bytes_per_second=900e9)),
    (r"\bV100-PCIE-16GB\b", DeviceFacts(fp16=112, fp32=14, memory_bytes=16 * GB, bytes_per_second=900e9)),
    (r"\bV100-PCIE-32GB\b", DeviceFacts(fp16=112, fp32=14, memory_bytes=32 * GB, bytes_per_second=900e9)),
    (r"\bT4\b", DeviceFacts(fp16=65, fp32=8.1, memory_bytes=16 * GB, bytes_per_second=320e9)),
    # Apple's announcements of 2020 to 2022; no figure is published for later chips.
    (r"^Apple M1$", DeviceFacts(fp32=2.6, bytes_per_second=68.25e9)),
    (r"^Apple M1 Pro$", DeviceFacts(fp32=5.2, bytes_per_second=200e9)),
    (r"^Apple M1 Max$", DeviceFacts(fp32=10.4, bytes_per_second=400e9)),
    (r"^Apple M1 Ultra$", DeviceFacts(fp32=21, bytes_per_second=800e9)),
    (r"^Apple M2$", DeviceFacts(fp32=3.6, bytes_per_second=100e9)),
)


def find_device_facts(device_name: str) -> DeviceFacts | None:
    """What is published about a device, by the name its driver gives; None where nothing is known."""
    return next((facts for pattern, facts in DEVICES if re.search(pattern, device_name)), None)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak dense FLOP/s in a precision; None where the device or its rate is unknown."""
    facts = find_device_facts(device_name)
    teraflops: float | None = getattr(facts, precision) if facts else None
    return None if teraflops is None else teraflops * 1e12


def find_peak_flops(device: str, precision: Precision) -> float | None:
    """Peak dense FLOP/s of a torch device in a precision; None where it is unknown.

    It is for every CPU, also those of Apple's chips, which go by the same name as the GPU beside them.
    """
    return None if device == "cpu" else peak_flops(find_device_name(device), precision)


def find_device_name(device: str) -> str:
    """The name of a torch device ("cpu", "cuda:1", "mps") as its driver or operating system gives it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    if platform.system() == "Darwin":  # the GPU of an Apple chip has the chip's name
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return _read_model_name(Path("/proc/cpuinfo")) or platform.processor() or platform.machine()


def _read_model_name(cpuinfo: Path) -> str | None:
    """The first `model name` of Linux's list of processors; None where there is no list or no name in it."""
    if not cpuinfo.is_file():
        return None
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip() if found else None


def native_precision(device: str) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies bfloat16 matrices in hardware, else fp32.

    A CPU does with AMX tiles (Intel, since 2023) or AVX512-BF16 (AMD, since 2022), an NVIDIA GPU since
    compute capability 8.0 (2020). Elsewhere torch emulates bfloat16, slower than float32. Apple's GPUs
    train in fp32.
    """
    import torch

    if device == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    elif device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = False
    return "bf16" if native else "fp32"


def find_memory_bytes(device: str) -> int:
    """Bytes of memory a process may use on a torch device, whoever holds them at the moment."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    if device == "mps":
        import torch

        return int(torch.mps.recommended_max_memory())
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *_read_memory_limits()])


def _read_memory_limits() -> list[int]:
    """The limits a container sets on this process, in bytes; Linux writes `max` where there is none."""
    texts = [path.read_text(encoding="ascii").strip() for path in CGROUP_LIMITS if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]
