"""Batch arithmetic, against a twin that counts step by step."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.training.batch import BatchConfig, BatchPlan, constant_plan, plan_batches


class Case(NamedTuple):
    """A config, with a ramp or without, and its plan for some processes and any micro-batch."""

    config: BatchConfig
    plan: BatchPlan
    processes: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    processes, tokens_per_row, rows, sizes = (draw(st.integers(1, most)) for most in (6, 9, 6, 9))
    unit = rows * processes * tokens_per_row
    config = BatchConfig(
        tokens_per_step=unit * sizes,
        batch_ramp_start_tokens=unit if sizes > 1 else None,
        batch_ramp_tokens=draw(st.integers(1, 40 * unit)) if sizes > 1 else None,
    )
    return Case(config, plan_batches(config, tokens_per_row, draw(st.integers(1, 12)), processes), processes)


def sizes_step_by_step(config: BatchConfig, steps: int) -> list[int]:
    """The tokens of each step as the ramp is described: counted one after the other, in fractions."""
    first, full = config.batch_ramp_start_tokens, config.tokens_per_step
    if first is None:
        return [full] * steps
    share = Fraction(config.batch_ramp_tokens or 0, full // first - 1)
    sizes: list[int] = []
    for _ in range(steps):
        sizes.append(min(full, first + first * (sum(sizes) // share)))
    return sizes


@given(cases())
def test_step_size_follows_the_tokens_before(case):
    config, plan, _ = case
    sizes = sizes_step_by_step(config, 60)
    seen = [0, *accumulate(sizes)]
    assert [plan.tokens(step) for step in range(60)] == sizes
    assert [plan.tokens_before(step) for step in range(61)] == seen
    full_steps = [float(Fraction(tokens, config.tokens_per_step)) for tokens in seen]
    assert [plan.full_steps_before(step) for step in range(61)] == full_steps


@given(cases(), st.integers(0, 3000))
def test_steps_for_tokens_is_the_least(case, tokens):
    plan = case.plan
    steps = plan.steps_for(tokens)
    assert plan.tokens_before(steps) >= tokens
    assert steps == 0 or plan.tokens_before(steps - 1) < tokens
    assert plan.steps_for(plan.tokens_before(steps)) == steps


@given(cases())
def test_processes_share_each_row_once_evenly_and_in_order(case):
    """The next row of a process is the one that it computes next."""
    _, plan, size = case
    computed: dict[int, list[int]] = {rank: [] for rank in range(size)}
    seen: list[int] = []
    for step in range(30):
        shares = [plan.share(step, rank, size) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(plan.micro_batches(step)))
        assert len({len(share) for share in shares}) == 1
        for rank, share in enumerate(shares):
            for first, count in (plan.rows(step, number) for number in share):
                assert count == plan.micro_batch_size  # one shape: nothing is compiled twice
                seen += range(first, first + count)
                computed[rank].append(first)
        assert len(seen) * plan.tokens_per_row == plan.tokens_before(step + 1)
    assert seen == list(range(len(seen)))
    for rank, firsts in computed.items():
        assert [plan.next_row(first, rank, size) for first in firsts[:-1]] == firsts[1:]


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 64), st.integers(1, 100))
def test_micro_batch_is_the_largest_that_divides_and_fits(rows, processes, tokens, fit):
    plan = plan_batches(BatchConfig(tokens_per_step=processes * rows * tokens), tokens, fit, processes)
    assert plan.micro_batch_size == max(count for count in range(1, fit + 1) if rows % count == 0)
    assert plan == constant_plan(tokens, plan.micro_batch_size, processes * rows // plan.micro_batch_size)


RAMP = {"batch_ramp_start_tokens": 256, "batch_ramp_tokens": 9}


@pytest.mark.parametrize(
    "settings, processes, named",
    [
        ({"tokens_per_step": 1000}, 1, "tokens_per_step=1000.* 1024 is"),
        ({"tokens_per_step": 32}, 1, "tokens_per_step=32.* 64 is"),
        ({"micro_batch_size": 3}, 1, "micro_batch_size=3.* 1, 2, 4, 8, 16$"),
        ({"batch_ramp_start_tokens": 128}, 1, "batch_ramp_start_tokens and batch_ramp_tokens"),
        ({"batch_ramp_tokens": 128}, 1, "batch_ramp_start_tokens and batch_ramp_tokens"),
        ({**RAMP, "batch_ramp_start_tokens": 1024}, 1, "batch_ramp_start_tokens=1024"),
        ({**RAMP, "batch_ramp_start_tokens": 192}, 1, "batch_ramp_start_tokens=192.* 960 and 1152"),
        ({**RAMP, "batch_ramp_start_tokens": 600}, 1, "batch_ramp_start_tokens=600, as 1200 "),
        ({**RAMP, "batch_ramp_start_tokens": 32}, 1, "batch_ramp_start_tokens=32.* 64 is"),
        ({**RAMP, "tokens_per_step": 768, "batch_ramp_start_tokens": 96}, 1, "tokens=96.* (64|128) is"),
        ({**RAMP, "tokens_per_step": 600, "batch_ramp_start_tokens": 100}, 1, "tokens_per_step=600"),
        ({"batch_ramp_start_tokens": 0, "batch_ramp_tokens": 0}, 1, "tokens=0 .*batch_ramp_tokens=0"),
        ({"tokens_per_step": 0}, 1, "tokens_per_step=0"),
        ({"micro_batch_size": 0}, 1, "micro_batch_size=0"),
        ({**RAMP, "micro_batch_size": 8}, 1, "micro_batch_size=8.* 4 rows .* 1, 2, 4$"),
        ({}, 3, "16 rows of tokens_per_step=1024.* 3 processes; 960 and 1152 .* 2$"),
        ({}, 32, "32 processes; 2048 .* 16$"),
        ({"micro_batch_size": 8}, 4, "micro_batch_size=8.* 4 rows of each process.* 1, 2, 4$"),
        (RAMP, 8, "4 rows of batch_ramp_start_tokens=256.* 8 processes; 512 .* 4$"),
    ],
)
def test_indivisible_batch_names_values_that_divide(settings, processes, named):
    with pytest.raises(ValueError, match=named):
        plan_batches(BatchConfig(**{"tokens_per_step": 1024, **settings}), 64, 8, processes)
