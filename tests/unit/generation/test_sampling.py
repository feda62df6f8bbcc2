"""Sampling against naive implementations of the definitions."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overnight.generation import SamplingConfig
from overnight.generation.sampling import noise, sample

SETTINGS = [
    SamplingConfig(temperature=0),
    SamplingConfig(),
    SamplingConfig(top_k=None),
    SamplingConfig(top_k=None, top_p=0.9),
    SamplingConfig(top_k=5, top_p=0.5),
]
LOGITS = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3))


def draw(logits_V: Tensor, times: int, **config: float | None) -> Counter[int]:
    drawn = sample(logits_V.expand(times, -1), SamplingConfig(**config), range(times), [0] * times)  # type: ignore[arg-type]
    return Counter(drawn.tolist())


def naive_support(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> set[int]:
    """The ids that may be drawn, by definition."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, kept, reached = sum(weights), set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        kept.add(i)
        reached += weight
        if top_p is not None and reached >= top_p * total:
            break
    return kept


@pytest.mark.parametrize(
    ("wanted", "used", "fits"), [(0.5, 0.5, True), (1.0, 1.0, True), (2.0, 2.0, True), (1.0, 1.1, False)]
)
def test_frequencies_match_softmax(wanted: float, used: float, fits: bool) -> None:
    """The last one is the negative control."""
    logits, times = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]), 20_000
    counts = draw(logits, times, top_k=None, temperature=used)
    expected = ((logits.double() / wanted).softmax(-1) * times).tolist()
    chi_square = sum((counts[i] - mean) ** 2 / mean for i, mean in enumerate(expected))
    assert (chi_square < 20.5) == fits  # 5 degrees of freedom, p = 0.001


@settings(max_examples=60, deadline=None)
@given(
    hundredths=st.lists(st.integers(-600, 600), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_top_k_and_top_p_match_definition(
    hundredths: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = [number / 100 for number in hundredths]  # no two weights are equal
    drawn = draw(
        torch.tensor(logits, dtype=torch.float64), 500, temperature=temperature, top_k=top_k, top_p=top_p
    )
    assert set(drawn) <= naive_support(logits, temperature, top_k, top_p)


def test_top_p_keeps_smallest_set_and_ties() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    for top_p, kept in ((0.49, {1}), (0.51, {1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draw(logits, 2000, top_k=None, top_p=top_p)) == kept
    assert set(draw(logits, 2000, top_k=None, top_p=0.81)) > {1, 2}
    assert set(draw(logits, 2000, top_k=2, top_p=0.6)) == {1}  # 5/8 of what top-k kept
    tied = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1, 0.0]).log().clamp(min=-100)
    for top_k in (None, 5):
        assert set(draw(tied, 2000, top_k=top_k, top_p=0.5)) == {0, 1, 2}


def test_top_p_same_with_partial_and_full_sort() -> None:
    peaked = torch.zeros(20_000)
    peaked[:20] = torch.linspace(20, 15, 20)
    flat = torch.randn(20_000, generator=torch.Generator().manual_seed(2)) / 100
    config = SamplingConfig(top_k=None, top_p=0.9)
    single = sample(peaked[None], config, [0], [5]), sample(flat[None], config, [1], [5])
    together = sample(torch.stack([peaked, flat]), config, [0, 1], [5, 5])
    assert torch.equal(torch.cat(single), together)
    assert together[0] < 20


@pytest.mark.parametrize("config", SETTINGS)
def test_mps_logits_are_sampled_on_cpu(config: SamplingConfig) -> None:
    on_gpu = SimpleNamespace(device=torch.device("mps"), cpu=lambda: LOGITS)
    drawn = [sample(each, config, range(8), [7] * 8) for each in (on_gpu, LOGITS)]  # type: ignore[arg-type]
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SETTINGS)
def test_gpu_draws_same_ids(config: SamplingConfig) -> None:
    drawn = sample(LOGITS.to("cuda"), config, range(8), [7] * 8)
    assert drawn.device.type == "cuda"
    assert torch.equal(drawn.cpu(), sample(LOGITS, config, range(8), [7] * 8))


def test_noise_depends_on_seed_row_and_position() -> None:
    drawn = [noise(seed, row, position) for seed in range(9) for row in range(9) for position in range(9)]
    assert len(set(drawn)) == 9**3
    assert 0 <= min(drawn) <= max(drawn) < 1
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.05


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9, 1e300])
def test_extreme_temperatures_and_logits(temperature: float) -> None:
    (drawn,) = draw(torch.tensor([3e38, -3e38, 0.0, 1.0]), 1, top_k=None, temperature=temperature)
    assert 0 <= drawn < 4
    assert drawn == 0 or temperature > 1
    (drawn,) = draw(torch.full((60_000,), torch.finfo(torch.float32).max), 1, temperature=temperature)
    assert 0 <= drawn < 60_000


def test_non_finite_logits_raise() -> None:
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(2, 10)
        logits[1, 3] = value
        with pytest.raises(FloatingPointError, match="logits"):
            sample(logits, SamplingConfig(), [0, 1], [0, 0])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        *((SamplingConfig(temperature=value), "temperature") for value in (math.nan, math.inf, -0.1)),
        *((SamplingConfig(top_k=value), "top_k") for value in (0, -5)),
        *((SamplingConfig(top_p=value), "top_p") for value in (0.0, 1.5, math.nan)),
        *((config, None) for config in (*SETTINGS, SamplingConfig(top_p=1.0, top_k=10**9))),
    ],
)
def test_invalid_settings_are_named(config: SamplingConfig, named: str | None) -> None:
    assert [problem.split("=")[0] for problem in config.problems()] == ([named] if named else [])
