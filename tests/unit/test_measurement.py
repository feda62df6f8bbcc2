from __future__ import annotations

import pytest
import torch

from overnight import hardware
from overnight.hardware import measure_matmul_flops, peak_memory_bytes, reset_peak_memory


@pytest.mark.skipif(not hardware.CLEAR_REFS.exists(), reason="only Linux forgets a peak")
def test_the_peak_is_that_since_the_last_reset() -> None:
    size = 200_000_000
    before = peak_memory_bytes("cpu")
    assert before is not None
    held = torch.ones(size, dtype=torch.uint8)
    with_it = peak_memory_bytes("cpu")
    assert with_it is not None
    del held
    reset_peak_memory("cpu")
    after = peak_memory_bytes("cpu")
    assert after is not None
    assert after < with_it - 0.8 * size


def test_a_device_that_does_not_say_has_no_peak() -> None:
    assert peak_memory_bytes("mps") is None


def test_a_product_is_timed_and_torchs_setting_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "SIDE_ON_CPU", 256)
    before = torch.get_float32_matmul_precision()
    assert 1e8 < measure_matmul_flops("cpu", "fp32") < 1e14
    assert torch.get_float32_matmul_precision() == before
