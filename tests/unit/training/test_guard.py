"""What counts as a bad step, on invented runs; values that are not finite do not enter the history."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.training.guard import AT_LEAST, HISTORY, Guard, GuardConfig, Limits, SkippedRows, find_limit


def seen(steps: int, seed: int = 0, loss: float = 4.0) -> Guard:
    """The guard after sound steps, whose losses fall with some noise."""
    noise = random.Random(seed)
    guard = Guard()
    for step in range(steps):
        value = loss + math.exp(-step / 50) + noise.gauss(0, 0.05)
        guard = guard.after(value, 1 + noise.gauss(0, 0.1), is_applied=True)
    return guard


def test_no_limits_before_enough_steps():
    assert seen(AT_LEAST - 1).limits(5.0) == Limits()
    assert seen(AT_LEAST - 1).after(1e9, 1.0, is_applied=True).bad_steps == 0
    assert seen(500).limits(None) == Limits(), "off"
    assert math.isfinite(seen(AT_LEAST).limits(5.0).loss)


def test_limit_is_the_median_plus_robust_deviations():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert find_limit(values, 2.0) == pytest.approx(3 + 2 * 1.4826 * 1.0)
    assert find_limit([2.0] * 9, 5.0) == pytest.approx(2 + 5 * 0.02), "the least spread"
    noise = random.Random(1)
    many = [noise.gauss(10, 1) for _ in range(4000)]
    assert find_limit(many, 3.0) == pytest.approx(13, abs=0.2)
    assert find_limit([*many, *[1e12] * 100], 3.0) == pytest.approx(13, abs=0.3), "robust"


@given(
    poison=st.lists(
        st.tuples(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.booleans()),
        min_size=1,
        max_size=9,
    )
)
def test_bad_steps_are_counted_until_a_sound_one(poison):
    before = guard = seen(200)
    for value, is_loss in poison:
        bad = (value, 1.0) if is_loss else (4.0, value)
        is_applied = math.isfinite(value) and not is_loss
        guard = guard.after(*bad, is_applied=is_applied)
        if is_applied:
            return  # a large norm alone is clipped
    assert guard.bad_steps == len(poison)
    assert (guard.losses, guard.norms) == (before.losses, before.norms)
    assert guard.limits(6.0) == before.limits(6.0)
    assert guard.after(4.0, 1.0, is_applied=True).bad_steps == 0


def test_exploded_loss_is_bad_and_a_noisy_one_is_not():
    guard = seen(300)
    assert guard.after(4.2, 1.0, is_applied=True).bad_steps == 0
    assert guard.after(4.9, 1.0, is_applied=True).bad_steps == 0, "less than a nat"
    assert guard.after(5.6, 1.0, is_applied=True).bad_steps == 1
    wild = Guard()
    noise = random.Random(2)
    for _ in range(200):
        wild = wild.after(4 + noise.gauss(0, 0.5), 1.0, is_applied=True)
    assert wild.after(5.6, 1.0, is_applied=True).bad_steps == 0, "usual here"


def test_fp16_overflow_is_not_a_bad_step():
    guard = seen(50)
    assert guard.after(4.0, math.inf, is_applied=False, is_scaled=True) == guard
    assert guard.after(math.nan, math.inf, is_applied=False, is_scaled=True).bad_steps == 1
    assert guard.after(4.0, math.inf, is_applied=False).bad_steps == 1


def test_history_is_bounded_and_survives_json_to_the_bit():
    guard = seen(1000)
    assert len(guard.losses) == len(guard.norms) == HISTORY
    before = Guard(guard.losses, guard.norms, 2, (SkippedRows(5, 16), SkippedRows(9, 8)))
    values = dataclasses.asdict(before)
    again = Guard.from_values(json.loads(json.dumps(values)))
    assert again == before
    assert again.limits(4.0) == guard.limits(4.0)
    values["detours"] = values.pop("skipped")
    assert Guard.from_values(values) == before, "the name of earlier versions"


def test_rows_are_skipped_from_a_step_on():
    guard = Guard(skipped=(SkippedRows(5, 16), SkippedRows(9, 8)))
    assert [guard.skipped_rows(step) for step in (0, 4, 5, 8, 9, 100)] == [0, 0, 16, 16, 24, 24]


@pytest.mark.parametrize(
    "name, value",
    [*[("spike_sigma", value) for value in (0.5, math.nan, math.inf)]]
    + [("rollback_after_steps", 0), ("max_rollbacks", -1)],
)
def test_invalid_setting_is_named(name, value):
    (problem,) = GuardConfig(**{name: value}).problems()
    assert name in problem
