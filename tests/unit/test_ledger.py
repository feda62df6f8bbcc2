"""Plan and stream together: each row once an epoch, in one order, however a step is divided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overnight.data.loader import TokenStream
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.training.batch import BatchConfig, BatchPlan, plan_batches

Share = Callable[[BatchPlan, int, int, int], range]
T = 8
EPOCHS = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """About 1,500 tokens of characters, in several shards."""
    root = tmp_path_factory.mktemp("text")
    for number in range(20):
        (root / f"{number:02}.txt").write_text(f"Line {number} tells of {number * 7 % 100}.\n" * 4)
    out = root / "shards"
    prepare_shards(
        PrepareConfig(
            source=str(root), out=str(out), tokenizer="characters", validation_fraction=0.2, shard_tokens=400
        )
    )
    return out


@st.composite
def divisions(draw: st.DrawFn) -> tuple[BatchPlan, int]:
    """A plan, with a ramp or without, and the number of processes that share it."""
    processes, at_once = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    unit = processes * at_once * draw(st.integers(1, 3)) * T
    sizes = draw(st.integers(1, 3))
    ramp = (
        {"batch_ramp_start_tokens": unit, "batch_ramp_tokens": draw(st.integers(1, 2000))}
        if sizes > 1
        else {}
    )
    config = BatchConfig(tokens_per_step=unit * sizes, micro_batch_size=at_once, **ramp)
    return plan_batches(config, T, at_once, processes), processes


def windows(stream: TokenStream, plan: BatchPlan, processes: int, share: Share) -> list[int]:
    """The start of each row that the processes read, step by step, until the epochs are over."""
    found: list[int] = []
    step = 0
    while len(found) < EPOCHS * stream.rows_per_epoch:
        for rank in range(processes):
            for micro_batch in share(plan, step, rank, processes):
                first, rows = plan.rows(step, micro_batch)
                found += [stream.row_start(row) for row in range(first, first + rows)]
        step += 1
    return found[: EPOCHS * stream.rows_per_epoch]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=divisions(), seed=st.integers(0, 3), shuffled=st.sampled_from([None, 300]))
def test_each_row_is_read_once_an_epoch_in_one_order(shards, drawn, seed, shuffled):
    plan, processes = drawn
    stream = TokenStream(shards, tokens_per_row=T, seed=seed, shuffle_window=shuffled)
    per_epoch = stream.rows_per_epoch
    found = windows(stream, plan, processes, BatchPlan.share)
    for epoch in range(EPOCHS):
        assert len({*found[epoch * per_epoch : (epoch + 1) * per_epoch]}) == per_epoch
    assert found == [stream.row_start(row) for row in range(EPOCHS * per_epoch)]


def test_comparison_detects_a_wrong_share(shards):
    """The negative control: each process computes what the first one does."""
    plan = plan_batches(BatchConfig(tokens_per_step=4 * T, micro_batch_size=1), T, 1, 2)
    stream = TokenStream(shards, tokens_per_row=T)
    found = windows(stream, plan, 2, lambda plan, step, rank, size: plan.share(step, 0, size))
    assert len({*found[: stream.rows_per_epoch]}) < stream.rows_per_epoch
