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

EVERYTHING = SamplingConfig(top_k=None)
SETTINGS = [
    SamplingConfig(),
    EVERYTHING,
    SamplingConfig(top_k=None, top_p=0.9),
    SamplingConfig(top_k=5, top_p=0.5),
]


def draw(logits_V: Tensor, config: SamplingConfig, times: int) -> Counter[int]:
    rows = logits_V.expand(times, -1)
    return Counter(sample(rows, config, range(times), [0] * times).tolist())


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


def chi_square(counts: Counter[int], expected: Tensor, times: int) -> float:
    return sum((counts[i] - times * p) ** 2 / (times * p) for i, p in enumerate(expected.tolist()))


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(1))
    drawn = sample(logits, SamplingConfig(temperature=0), range(5), range(5))
    assert drawn.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    config = SamplingConfig(top_k=None, temperature=temperature)
    times = 20_000
    expected = (logits.double() / temperature).softmax(-1)
    assert chi_square(draw(logits, config, times), expected, times) < 20.5  # 5 degrees of freedom, p = 0.001


def test_chi_square_detects_wrong_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    counts = draw(logits, SamplingConfig(top_k=None, temperature=1.1), 20_000)
    assert chi_square(counts, logits.double().softmax(-1), 20_000) > 20.5


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
    logits = [number / 100 for number in hundredths]  # no two so close that their weights are equal
    given_logits = torch.tensor(logits, dtype=torch.float64)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = set(draw(given_logits, config, 500))
    assert drawn <= naive_support(logits, temperature, top_k, top_p)


def test_top_p_keeps_smallest_set() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    assert set(draw(logits, SamplingConfig(top_k=None, top_p=0.49), 2000)) == {1}
    assert set(draw(logits, SamplingConfig(top_k=None, top_p=0.51), 2000)) == {1, 2}
    assert set(draw(logits, SamplingConfig(top_k=None, top_p=0.81), 2000)) > {1, 2}
    assert set(draw(logits, SamplingConfig(top_k=None, top_p=1.0), 2000)) == {0, 1, 2, 3}
    assert set(draw(logits, SamplingConfig(top_k=2, top_p=0.6), 2000)) == {1}  # 5/8 of what top-k kept


def test_top_p_same_with_partial_and_full_sort() -> None:
    peaked = torch.zeros(20_000)
    peaked[:20] = torch.linspace(20, 15, 20)
    flat = torch.randn(20_000, generator=torch.Generator().manual_seed(2)) / 100
    config = SamplingConfig(top_k=None, top_p=0.9)
    single = sample(peaked[None], config, [0], [5]), sample(flat[None], config, [1], [5])
    together = sample(torch.stack([peaked, flat]), config, [0, 1], [5, 5])
    assert torch.equal(torch.cat(single), together)
    assert together[0] < 20


@pytest.mark.parametrize("top_k", [None, 5])
def test_top_p_keeps_ties(top_k: int | None) -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1, 0.0]).log().clamp(min=-100)
    assert set(draw(logits, SamplingConfig(top_k=top_k, top_p=0.5), 2000)) == {0, 1, 2}


@pytest.mark.parametrize("config", SETTINGS)
def test_row_does_not_depend_on_batch(config: SamplingConfig) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3))
    together = sample(logits, config, range(8), [7] * 8).tolist()
    assert [int(sample(logits[r : r + 1], config, [r], [7])) for r in range(8)] == together
    assert sample(logits.flip(0), config, range(7, -1, -1), [7] * 8).tolist() == together[::-1]


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0), *SETTINGS])
def test_mps_logits_are_sampled_on_cpu(config: SamplingConfig) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3))
    on_gpu = SimpleNamespace(device=torch.device("mps"), cpu=lambda: logits)
    drawn = [sample(each, config, range(8), [7] * 8) for each in (on_gpu, logits)]
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("config", SETTINGS)
def test_gpu_draws_same_ids(config: SamplingConfig) -> None:
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(3))
    drawn = sample(logits.to("cuda"), config, range(8), [7] * 8)
    assert drawn.device.type == "cuda"
    assert torch.equal(drawn.cpu(), sample(logits, config, range(8), [7] * 8))


def test_noise_depends_on_seed_row_and_position() -> None:
    keys = [(seed, row, position) for seed in range(9) for row in range(9) for position in range(9)]
    drawn = [noise(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert all(0 <= number < 1 for number in drawn)
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.05


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9, 1e300])
def test_extreme_temperatures_stay_in_the_vocabulary(temperature: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    drawn = sample(logits, SamplingConfig(top_k=None, temperature=temperature), [0], [0])
    assert 0 <= int(drawn) < 4
    if temperature < 1:
        assert int(drawn) == 0
    largest = torch.full((1, 60_000), torch.finfo(torch.float32).max)
    assert 0 <= int(sample(largest, SamplingConfig(top_k=None, temperature=temperature), [0], [0])) < 60_000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_raise(value: float) -> None:
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
        *((config, None) for config in (*SETTINGS, SamplingConfig(temperature=0, top_p=1.0, top_k=10**9))),
    ],
)
def test_invalid_settings_are_named(config: SamplingConfig, named: str | None) -> None:
    assert [problem.split("=")[0] for problem in config.problems()] == ([named] if named else [])
