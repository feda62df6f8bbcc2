"""Batch arithmetic, against a twin that counts step by step."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.training.batch import BatchConfig, BatchPlan, constant_plan, plan_batches

GPT3 = BatchConfig(tokens_per_step=524_288, batch_ramp_start_tokens=32_768, batch_ramp_tokens=4 * 10**9)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchConfig, BatchPlan]:
    """A config, with a ramp or without, and its plan with any micro-batch."""
    tokens_per_row, unit_rows, sizes = (draw(st.integers(1, most)) for most in (9, 12, 9))
    unit = unit_rows * tokens_per_row
    config = BatchConfig(
        tokens_per_step=unit * sizes,
        batch_ramp_start_tokens=unit if sizes > 1 else None,
        batch_ramp_tokens=draw(st.integers(1, 40 * unit)) if sizes > 1 else None,
    )
    return config, plan_batches(config, tokens_per_row, draw(st.integers(1, 12)))


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


@given(plans())
def test_step_size_follows_the_tokens_before(drawn):
    config, plan = drawn
    sizes = sizes_step_by_step(config, 60)
    assert [plan.tokens(step) for step in range(60)] == sizes
    assert [plan.tokens_before(step) for step in range(61)] == [0, *accumulate(sizes)]


@given(plans())
def test_full_steps_are_counted_by_tokens(drawn):
    config, plan = drawn
    sizes = sizes_step_by_step(config, 60)
    counted = [plan.full_steps_before(step) for step in range(61)]
    assert counted == [float(Fraction(seen, config.tokens_per_step)) for seen in (0, *accumulate(sizes))]
    assert (counted == list(range(61))) == (min(sizes) == config.tokens_per_step)


@given(plans())
def test_plan_covers_each_row_once_in_order(drawn):
    config, plan = drawn
    seen: list[int] = []
    for step, tokens in enumerate(sizes_step_by_step(config, 30)):
        for micro_batch in range(plan.micro_batches(step)):
            first, count = plan.rows(step, micro_batch)
            assert count == plan.micro_batch_size  # one shape: nothing is compiled twice
            seen += range(first, first + count)
        assert len(seen) * plan.tokens_per_row == plan.tokens_before(step + 1)
        assert plan.tokens(step) == tokens
    assert seen == list(range(len(seen)))


@given(plans(), st.integers(0, 3000))
def test_steps_for_tokens_is_the_least(drawn, tokens):
    _, plan = drawn
    steps = plan.steps_for(tokens)
    assert plan.tokens_before(steps) >= tokens
    assert steps == 0 or plan.tokens_before(steps - 1) < tokens
    assert plan.steps_for(plan.tokens_before(steps)) == steps


@st.composite
def shared_plans(draw: st.DrawFn) -> tuple[BatchPlan, int]:
    """A plan, with a ramp or without, and a number of processes that share its steps."""
    size, tokens_per_row = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    unit = draw(st.integers(1, 6)) * size * tokens_per_row
    sizes = draw(st.integers(1, 5))
    config = BatchConfig(
        tokens_per_step=unit * sizes,
        batch_ramp_start_tokens=unit if sizes > 1 else None,
        batch_ramp_tokens=draw(st.integers(1, 30 * unit)) if sizes > 1 else None,
    )
    return plan_batches(config, tokens_per_row, draw(st.integers(1, 8)), size), size


@given(shared_plans())
def test_processes_share_a_step_evenly_in_order(drawn):
    plan, size = drawn
    for step in range(40):
        shares = [plan.share(step, rank, size) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(plan.micro_batches(step)))
        assert len({len(share) for share in shares}) == 1


@given(shared_plans())
def test_next_row_is_what_the_process_computes_next(drawn):
    """The naive twin writes down all that a process computes and looks one further."""
    plan, size = drawn
    for rank in range(size):
        firsts = [plan.rows(step, number)[0] for step in range(40) for number in plan.share(step, rank, size)]
        assert [plan.next_row(first, rank, size) for first in firsts[:-1]] == firsts[1:]


def test_micro_batch_divides_the_rows_of_each_process():
    """Of 48 rows, each of three processes has 16, and five fit: four at once."""
    plan = plan_batches(BatchConfig(tokens_per_step=48 * 64), 64, 5, 3)
    assert plan == constant_plan(64, 4, 12)


def test_ramp_sizes_have_equal_shares_of_its_tokens():
    plan = plan_batches(GPT3, 2048, 16)
    assert [stage.micro_batches for stage in plan.stages] == list(range(1, 17))
    share = 4 * 10**9 / 15
    for stage, following in pairwise(plan.stages):
        held = plan.tokens_before(following.first_step) - plan.tokens_before(stage.first_step)
        assert held == pytest.approx(share, abs=plan.tokens(following.first_step))
    full_from = plan.stages[-1].first_step
    assert plan.tokens_before(full_from - 1) < 4 * 10**9 <= plan.tokens_before(full_from)
    assert plan.tokens(full_from) == plan.tokens(10**9) == 524_288


@pytest.mark.parametrize("rows_that_fit, at_once", [(1, 1), (7, 4), (15, 8), (500, 16)])
def test_ramp_steps_do_not_depend_on_the_micro_batch(rows_that_fit, at_once):
    plan = plan_batches(GPT3, 2048, rows_that_fit)
    assert plan.micro_batch_size == at_once
    twin = plan_batches(GPT3, 2048, 16)
    for step in (0, 1, 8138, 8139, 8140, 20_000, 10**6):
        assert plan.tokens(step) == twin.tokens(step)
        assert plan.rows(step, 0)[0] == twin.rows(step, 0)[0]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 100))
def test_micro_batch_is_the_largest_that_divides_and_fits(rows, tokens, fit):
    plan = plan_batches(BatchConfig(tokens_per_step=rows * tokens), tokens, fit)
    assert plan == constant_plan(tokens, plan.micro_batch_size, rows // plan.micro_batch_size)
    assert plan.tokens(5) == rows * tokens
    assert [count for count in range(1, fit + 1) if rows % count == 0 and count >= plan.micro_batch_size] == [
        plan.micro_batch_size
    ]


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
        ({**RAMP, "batch_ramp_start_tokens": 600}, 1, "batch_ramp_start_tokens=600.* 1200"),
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
