from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.loader import TokenStream
from overnight.data.mixture import Concatenation, Interleaving, Mixture
from overnight.data.shards import Manifest

Prepare = Callable[..., Manifest]

some_weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9), min_size=1, max_size=9)


# The interleaving


@given(weights=some_weights, first=st.integers(0, 10**9))
def test_every_row_is_the_next_of_one_source_and_none_drifts(weights: list[float], first: int) -> None:
    order = Interleaving(weights)
    counts = order.counts(first)
    assert sum(counts) == first
    for row in range(first, first + 50):
        source, number = order.locate(row)
        assert number == counts[source]
        counts[source] += 1
        assert order.counts(row + 1) == counts
    bound = math.ceil(math.log2(len(weights))) / 2
    for count, weight in zip(order.counts(first), weights, strict=True):
        share = first * weight / math.fsum(weights)
        assert abs(count - share) <= bound + 1e-6 * (1 + share * 1e-6)


def test_interleaving_repeats_the_pattern_of_its_weights() -> None:
    order = Interleaving([0.7, 0.3])
    sources = [order.locate(row)[0] for row in range(10)]
    assert sources == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]  # 0.7 c to the nearest: 1 1 2 3 4 4 5 6 6 7
    assert sources == [order.locate(10**18 + row)[0] for row in range(10)]  # 7 of 10, without an end
    assert order.counts(10**18) == [7 * 10**17, 3 * 10**17]
    assert Interleaving([7, 3]).counts(10**6 + 5) == order.counts(10**6 + 5)


# Mixtures of streams


@pytest.fixture
def streams(tmp_path: Path, prepared: Prepare) -> list[TokenStream]:
    """Three sources: the ids of source k begin at 10,000 k."""
    found = []
    for number, size in enumerate((500, 4000, 900)):
        first = 10_000 * number
        prepared(tmp_path / str(number), range(first, first + size), range(first, first + 50 * (number + 1)))
        found.append(TokenStream(tmp_path / str(number), tokens_per_row=16, seed=3))
    return found


def mix(streams: Sequence[TokenStream], weights: Sequence[float]) -> Mixture:
    return Mixture({f"source {number}": stream for number, stream in enumerate(streams)}, weights)


def test_mixed_rows_do_not_depend_on_batches(streams: list[TokenStream]) -> None:
    weights, parts = [0.5, 0.2, 0.3], [5, 1, 1, 30, 12]
    first = 97  # the first source, of 32 rows, is in its second epoch
    places = map(Interleaving(weights).locate, range(first, first + sum(parts)))
    expected = [streams[source].batch(number, 1) for source, number in places]
    firsts = itertools.accumulate(parts, initial=first)
    found = [mix(streams, weights).batch(begin, rows) for begin, rows in zip(firsts, parts, strict=False)]
    for name in ("ids", "targets"):
        ours, theirs = (torch.cat([getattr(batch, name) for batch in each]) for each in (found, expected))
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.int64


def test_mixture_counts_rows_and_epochs_of_each_source(streams: list[TokenStream]) -> None:
    mixture, rows = mix(streams, [2, 1, 1]), 400
    seen = (mixture.batch(0, rows).ids[:, 0] // 10_000).bincount().tolist()
    assert mixture.rows_of_each(rows) == seen == [200, 100, 100]
    per_epoch = [math.ceil(size / 16) for size in (500, 4000, 900)]
    assert mixture.epochs_of_each(rows) == [200 / per_epoch[0], 100 / per_epoch[1], 100 / per_epoch[2]]
    assert mixture.tokens == 5400
    assert "25.0% source 1" in mixture.describe_shares()


@pytest.mark.usefixtures("streams")
def test_evaluation_covers_all_sources_in_proportion(tmp_path: Path) -> None:
    parts = {str(k): TokenStream(tmp_path / str(k), "validation", tokens_per_row=16) for k in range(3)}
    whole = Concatenation(parts)
    targets = torch.cat([batch.targets.flatten() for batch in whole.evaluation_batches(2)])
    ends = [(10_000 * k, size) for k, size in enumerate((50, 100, 150))]
    assert targets.tolist() == [id for first, size in ends for id in range(first + 1, first + size)]
    some = torch.cat([batch.targets.flatten() for batch in whole.evaluation_batches(2, 60)])
    assert (some // 10_000).bincount().tolist() == whole.evaluation_tokens(60) == [10, 20, 30]
    assert whole.evaluation_tokens(1) == [1, 1, 1]
    assert whole.evaluation_tokens(10**9) == [50, 100, 150]
    assert whole.evaluation_tokens(None) == [None] * 3


# A corpus sorted by source

SOURCES, ROWS_PER_STEP, STEPS = (0.5, 0.25, 0.15, 0.1), 64, 30


def chi_squared(steps: Sequence[torch.Tensor]) -> float:
    """Of the rows of each source in each step, against the shares of the whole."""
    counts = torch.stack([ids[:, 0].bincount(minlength=len(SOURCES)) for ids in steps])
    expected = ROWS_PER_STEP * torch.tensor(SOURCES)
    return float(((counts - expected) ** 2 / expected).sum())


def test_each_step_of_a_sorted_corpus_has_all_sources(tmp_path: Path, prepared: Prepare) -> None:
    """All of one source, then all of the next; an id says which. The loss must not show the shards."""
    length, rows = 16, STEPS * ROWS_PER_STEP
    ids = [source for source, share in enumerate(SOURCES) for _ in range(round(share * rows * length))]
    prepared(tmp_path, ids, shard_tokens=2000)
    stream = TokenStream(tmp_path, tokens_per_row=length, seed=1337)
    # Sources x steps, less one each since rows are drawn without replacement, are independent.
    freedom = (len(SOURCES) - 1) * (STEPS - 1)
    limit = freedom + 4 * math.sqrt(2 * freedom)
    for first in (0, rows, 2 * rows):
        steps = [stream.batch(first + n * ROWS_PER_STEP, ROWS_PER_STEP).ids for n in range(STEPS)]
        assert chi_squared(steps) < limit
    in_order = [batch.ids for batch in stream.evaluation_batches(ROWS_PER_STEP)]
    assert chi_squared(in_order[: STEPS - 1]) > 10 * limit  # the negative control
