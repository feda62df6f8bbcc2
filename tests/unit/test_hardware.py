"""Devices: their names, published rates and precisions; memory and speed as measured here."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from overnight import hardware
from overnight.hardware import (
    CPUINFO,
    DEVICES,
    find_device,
    find_device_name,
    find_memory_bytes,
    find_peak_flops,
    measure_matmul_flops,
    native_precision,
    peak_memory_bytes,
    reset_peak_memory,
)

# Names as the driver writes them -> bf16 peak; figures copied from the public data sheets a second time.
NAMES_AND_BF16 = {
    **{"NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H100 80GB HBM3": 989e12},
    **{"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA B200": 2250e12},
    **{"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12},
    **{"NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12},
    **{"NVIDIA L40S": 362e12, "NVIDIA L4": 121e12},
    **{"NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 3090": 71e12},
    **dict.fromkeys(("Tesla V100-SXM2-16GB", "Tesla T4", "Apple M1 Max")),
}


def test_published_rates_are_those_of_the_data_sheets():
    found = {name: find_device(name).peak_flops("bf16") for name in NAMES_AND_BF16}
    assert found == pytest.approx(NAMES_AND_BF16)


def test_every_device_of_the_table_is_reached():
    names = [*NAMES_AND_BF16, "NVIDIA H100 SXM5"]
    names += [f"Tesla V100-{name}" for name in ("SXM2-32GB", "PCIE-16GB", "PCIE-32GB")]
    names += [f"Apple M{number}{kind}" for number in (1, 2, 3, 4) for kind in ("", " Pro", " Max", " Ultra")]
    reached = {id(find_device(name)) for name in names}
    assert [device.name for device in DEVICES if id(device) not in reached] == []
    assert [device.name for device in DEVICES if find_device(device.name) is not device] == []


TYPED_NAMES = {
    **{"h200": "h200", "NVIDIA H200": "h200", "a100-80gb": "a100-80gb", "A100 80GB": "a100-80gb"},
    **{"NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100-SXM4-40GB": "a100-40gb", "t4": "t4"},
    **{"4090": "rtx-4090", "rtx_4090": "rtx-4090", "NVIDIA GeForce RTX 4090": "rtx-4090", "Tesla T4": "t4"},
    **{"v100-32gb": "v100-32gb", "Apple M2": "m2", "m1 max": "m1-max"},
    **dict.fromkeys(("a100", "v100", "5090", "4090 laptop", "gpu", "")),  # ambiguous or unknown
    **dict.fromkeys(("AMD EPYC 9654", "Apple M5", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 3090 Ti")),
    **dict.fromkeys(("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D")),
}


def test_device_is_found_by_typed_and_driver_names():
    found = {typed: find_device(typed) for typed in TYPED_NAMES}
    assert {typed: device and device.name for typed, device in found.items()} == TYPED_NAMES


def test_precisions_and_rates_of_the_table():
    precisions = {"h200": "bf16", "t4": "fp16", "v100-16gb": "fp16", "m1": "fp32"}
    assert {name: find_device(name).native for name in precisions} == precisions
    facts = find_device("Apple M3 Max")
    assert (facts.fp32, facts.bytes_per_second) == (None, None)
    assert facts.peak_flops("fp32") is None
    for facts in DEVICES:
        rates = [rate for rate in (facts.fp32, facts.tf32, facts.bf16) if rate is not None]
        assert rates == sorted(rates), facts.name
        assert facts.memory_bytes is None or 16e9 <= facts.memory_bytes < 200e9, facts.name
        assert facts.bytes_per_second is None or 60e9 < facts.bytes_per_second < 10e12, facts.name


@pytest.mark.skipif(not CPUINFO.is_file(), reason="only Linux describes its processors")
def test_cpu_name_and_precision_are_those_of_linux():
    described = CPUINFO.read_text(encoding="utf-8")
    has_bf16 = {*described.split()} & {"amx_tile", "avx512_bf16"}
    assert native_precision("cpu") == ("bf16" if has_bf16 else "fp32")
    assert find_device_name("cpu") == re.findall(r"model name\s*: (.*)", described)[0].strip()


CAPABILITIES = {(6, 1): "fp32", (7, 0): "fp16", (7, 5): "fp16", (8, 0): "bf16", (9, 0): "bf16"}


def test_native_precision_follows_the_hardware(monkeypatch):
    """bf16 with AMX or AVX512 on a CPU and since Ampere on a GPU, which has fp16 since Volta."""
    for amx, avx512 in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert native_precision("cpu") == ("bf16" if amx or avx512 else "fp32")
    for capability, precision in CAPABILITIES.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert native_precision("cuda:0") == precision
    assert native_precision("mps") == "fp32"


def test_gpu_and_apple_chip_are_named_by_driver_and_system(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"driver's name of {device}")
    assert find_device_name("cuda:1") == "driver's name of cuda:1"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(stdout="Apple M2\n"))
    assert find_device_name("mps") == find_device_name("cpu") == "Apple M2"
    assert find_peak_flops("mps", "fp32") == pytest.approx(3.6e12)
    assert find_peak_flops("cpu", "fp32") is None  # the figure is the GPU's


def test_memory_is_the_installed_or_the_container_s_limit(monkeypatch, tmp_path):
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "CGROUP_LIMITS", (limit, tmp_path / "absent"))
    assert find_memory_bytes("cpu") == installed
    limit.write_text("max\n")
    assert find_memory_bytes("cpu") == installed
    limit.write_text("1048576\n")
    assert find_memory_bytes("cpu") == 1_048_576


@pytest.mark.skipif(not hardware.CLEAR_REFS.exists(), reason="only Linux resets a peak")
def test_peak_memory_is_since_the_last_reset():
    assert peak_memory_bytes("mps") is None
    size = 200_000_000
    held = torch.ones(size, dtype=torch.uint8)
    with_it = peak_memory_bytes("cpu")
    del held
    reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") < with_it - 0.8 * size


def test_matmul_is_timed_and_torch_s_setting_kept(monkeypatch):
    monkeypatch.setattr(hardware, "SIDE_ON_CPU", 256)
    before = torch.get_float32_matmul_precision()
    assert 1e8 < measure_matmul_flops("cpu", "fp32") < 1e14
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
def test_gpu_is_known_and_its_precision_agrees_with_torch():
    name = find_device_name("cuda:0")
    facts = find_device(name)
    assert facts is not None, f"no published figures for {name!r}"
    assert facts.memory_bytes == pytest.approx(find_memory_bytes("cuda:0"), rel=0.1)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert native_precision("cuda") == ("bf16" if native else "fp32")
