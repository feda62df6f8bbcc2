"""Long series made fit for a picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.baselines.band import columns_of
from overnight.report.plots import spread, thinned
from overnight.report.run_data import median, smoothed


def slowly_smoothed(series, weights, window):
    """The definition, value by value."""
    reach, result = window // 2, []
    for at in range(len(series)):
        near = range(at - min(reach, at), min(len(series), at + min(reach, at) + 1))
        kept = [index for index in near if np.isfinite(series[index])]
        total = sum(weights[index] for index in kept)
        result.append(sum(series[index] * weights[index] for index in kept) / total if total else np.nan)
    return result


@pytest.mark.parametrize("window", [1, 2, 5, 200])
def test_smoothing_is_the_weighted_mean_of_neighbours(window):
    noise = np.random.default_rng(0)
    series, weights = noise.normal(5, 1, 60), noise.uniform(1, 4, 60)
    series[[7, 30, 31, 32, 33, 34]] = np.nan, np.nan, np.inf, np.nan, np.nan, np.nan
    expected = slowly_smoothed(series, weights, window)
    np.testing.assert_allclose(smoothed(series, weights, window), expected, rtol=1e-12)


def test_smoothing_does_not_flatten_a_falling_start():
    line = np.linspace(11, 3, 1000)
    np.testing.assert_allclose(smoothed(line)[:900], line[:900], atol=1e-9)


def test_values_that_are_missing_or_not_finite():
    assert median(np.array([np.nan, 3.0, 1.0, np.inf, 2.0])) == 2
    assert median(np.array([np.nan])) is None
    lines = [{"loss": 1}, {}, {"loss": None}, {"loss": "x"}, {"loss": 2.5}]
    np.testing.assert_array_equal(columns_of(lines)["loss"], [1, np.nan, np.nan, np.nan, 2.5])


def test_thinning_keeps_the_ends_and_every_spike():
    series = np.random.default_rng(1).normal(size=100_000)
    series[[12_345, 77_777]] = 50, -50
    kept = thinned(series, 1_500)
    assert len(kept) <= 1_500
    assert {0, 12_345, 77_777, 99_999} <= set(kept)
    assert np.all(np.diff(kept) > 0)
    np.testing.assert_array_equal(thinned(np.arange(10.0), 10), np.arange(10))
    assert set(thinned(np.full(5_000, np.nan), 100)) == {0, 4_999}


@given(st.lists(st.floats(-100, 100), max_size=12), st.floats(0.1, 5))
def test_labels_are_spread_in_order_and_no_further_than_needed(wanted, gap):
    placed = spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    if np.all(np.diff(np.sort(wanted)) >= gap):
        assert placed == pytest.approx(wanted)
    assert np.all(np.diff(np.array(placed)[order]) >= gap - 1e-9)
    if wanted:
        assert np.mean(placed) == pytest.approx(np.mean(wanted), abs=1e-6)
