from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.batching import BatchConfig, estimate_rows_that_fit, plan_batches
from overnight.model.config import PRESETS


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 100))
def test_a_plan_covers_each_row_of_each_step_once(rows: int, tokens_per_row: int, fit: int) -> None:
    plan = plan_batches(BatchConfig(tokens_per_step=rows * tokens_per_row), tokens_per_row, fit)
    assert plan.tokens_per_step == rows * tokens_per_row
    assert plan.rows_per_micro_batch <= max(1, fit)
    seen = []
    for step in range(3):
        for micro_batch in range(plan.micro_batches):
            first, count = plan.rows(step, micro_batch)
            seen += range(first, first + count)
    assert seen == list(range(3 * rows))


def test_what_does_not_divide_names_values_that_do() -> None:
    with pytest.raises(ValueError, match=r"context_length=64; 1024 is"):
        plan_batches(BatchConfig(tokens_per_step=1000), 64, 8)
    with pytest.raises(ValueError, match=r"these do: 1, 2, 4, 8, 16"):
        plan_batches(BatchConfig(tokens_per_step=1024, rows_per_micro_batch=3), 64, 8)
    with pytest.raises(ValueError, match=r"; 64 is"):
        plan_batches(BatchConfig(tokens_per_step=32), 64, 8)


def test_more_memory_holds_more_rows_and_a_bigger_model_fewer() -> None:
    small, big = PRESETS["gpt2-124m"], PRESETS["gpt2-1558m"]
    rows = [estimate_rows_that_fit(small, gigabytes * 10**9, "cuda") for gigabytes in (8, 16, 40, 80)]
    assert rows == sorted(rows)
    assert rows[0] >= 1
    assert estimate_rows_that_fit(big, 80 * 10**9, "cuda") < rows[-1]
