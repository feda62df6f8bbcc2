"""Tokens for an equal loss, read off curves."""

from __future__ import annotations

import pytest

from overnight.ablation.record import compare_curves, mean_curve, tokens_to_reach

CURVE = [(100, 4.0), (200, 3.0), (300, 2.5)]


@pytest.mark.parametrize(
    ("loss", "tokens"), [(3.5, 150), (3.0, 200), (2.75, 250), (2.5, 300), (2.4, None), (9.0, 100)]
)
def test_tokens_are_interpolated(loss: float, tokens: float | None) -> None:
    assert tokens_to_reach(CURVE, loss) == tokens


def test_curve_that_rises_again_counts_where_it_was_first_reached() -> None:
    assert tokens_to_reach([(100, 4.0), (200, 2.0), (300, 3.0)], 3.0) == 150


def test_each_curve_is_read_at_the_other_ones_end() -> None:
    found = compare_curves(CURVE, [(100, 5.0), (300, 3.5)])
    assert found is not None
    assert (found.tokens, found.baseline_tokens) == (150, None)
    assert compare_curves(CURVE, [(300, 3.5)]) is None, "only the last evaluation"


def test_mean_curve_has_the_points_of_all_seeds() -> None:
    assert mean_curve([CURVE, [(200, 4.0), (300, 3.5)]]) == [(200, 3.5), (300, 3.0)]
