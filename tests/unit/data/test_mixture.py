from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.loader import Batch, TokenStream
from overnight.data.mixture import Concatenation, Interleaving, Mixture
from overnight.data.shards import Manifest

Prepare = Callable[..., Manifest]

some_weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9), min_size=1, max_size=9)


def exact_shares(weights: Sequence[float], rows: int) -> list[float]:
    return [rows * weight / math.fsum(weights) for weight in weights]


@given(weights=some_weights, first=st.integers(0, 10**6))
def test_every_row_comes_from_one_source_and_is_its_next(weights: list[float], first: int) -> None:
    mixed = Interleaving(weights)
    counts = mixed.counts(first)
    assert sum(counts) == first
    for row in range(first, first + 50):
        source, number = mixed.locate(row)
        assert number == counts[source]
        counts[source] += 1
        assert mixed.counts(row + 1) == counts


@given(weights=some_weights, rows=st.integers(0, 10**9))
def test_no_source_ever_drifts_from_its_share(weights: list[float], rows: int) -> None:
    bound = math.ceil(math.log2(len(weights))) / 2
    for count, share in zip(Interleaving(weights).counts(rows), exact_shares(weights, rows), strict=True):
        assert abs(count - share) <= bound + 1e-6 * (1 + share * 1e-6)


def test_drawing_by_lot_would_drift() -> None:
    """The negative control: as many rows drawn at random leave the bound far behind."""
    drawn = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.7
    assert abs(int(drawn.sum()) - 7000) > 10


def test_the_pattern_is_that_of_the_weights() -> None:
    mixed = Interleaving([0.7, 0.3])
    sources = [mixed.locate(row)[0] for row in range(10)]
    assert sources == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]  # 0.7 c to the nearest: 1 1 2 3 4 4 5 6 6 7
    assert sources == [mixed.locate(10**18 + row)[0] for row in range(10)]  # 7 of 10, without an end
    assert mixed.counts(10**18) == [7 * 10**17, 3 * 10**17]
    assert Interleaving([7, 3]).counts(10**6 + 5) == mixed.counts(10**6 + 5)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, math.inf], [math.nan, 1]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite numbers above 0"):
        Interleaving(weights)


@pytest.fixture
def streams(tmp_path: Path, prepared: Prepare) -> list[TokenStream]:
    """Three sources: the ids of source k begin at 10,000 k, and an id is its own place."""
    found = []
    for number, size in enumerate((500, 4000, 900)):
        first = 10_000 * number
        prepared(tmp_path / str(number), range(first, first + size), range(first, first + 50 * (number + 1)))
        found.append(TokenStream(tmp_path / str(number), tokens_per_row=16, seed=3))
    return found


def mixed(streams: Sequence[TokenStream], weights: Sequence[float]) -> Mixture:
    return Mixture({f"source {number}": stream for number, stream in enumerate(streams)}, weights)


def rows_of(batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.ids for batch in batches]), torch.cat([batch.targets for batch in batches])


@pytest.mark.parametrize("parts", [[48], [1] * 48, [5, 1, 30, 12], [24, 24]])
def test_rows_do_not_depend_on_how_they_are_fetched(streams: list[TokenStream], parts: list[int]) -> None:
    weights = [0.5, 0.2, 0.3]
    first = 97  # the first source, of 32 windows, is in its second epoch
    mixture, naive = mixed(streams, weights), Interleaving(weights)
    expected = [
        streams[source].batch(number, 1)
        for source, number in map(naive.locate, range(first, first + sum(parts)))
    ]
    firsts = itertools.accumulate(parts, initial=first)
    found = [mixture.batch(begin, rows) for begin, rows in zip(firsts, parts, strict=False)]
    for ours, theirs in zip(rows_of(found), rows_of(expected), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.int64
        assert ours.is_contiguous()


def test_what_was_seen_of_each_source_is_counted(streams: list[TokenStream]) -> None:
    mixture = mixed(streams, [2, 1, 1])
    rows = 400
    seen = (mixture.batch(0, rows).ids[:, 0] // 10_000).bincount().tolist()
    assert mixture.rows_of_each(rows) == seen == [200, 100, 100]
    windows = [math.ceil(size / 16) for size in (500, 4000, 900)]
    assert mixture.epochs_of_each(rows) == [200 / windows[0], 100 / windows[1], 100 / windows[2]]
    assert mixture.tokens == 5400
    assert mixture.describe_shares() == "50.0% source 0, 25.0% source 1, 25.0% source 2"


def test_evaluation_goes_through_all_sources(tmp_path: Path, streams: list[TokenStream]) -> None:
    validation = [TokenStream(tmp_path / str(number), "validation", tokens_per_row=16) for number in range(3)]
    mixture = Concatenation({"a": validation[0], "b": validation[1], "c": validation[2]})
    targets = [batch.targets.flatten() for batch in mixture.evaluation_batches(2)]
    expected = [
        id for k, size in enumerate((50, 100, 150)) for id in range(10_000 * k + 1, 10_000 * k + size)
    ]
    assert torch.cat(targets).tolist() == expected
    assert mixture.evaluation_tokens(60) == [10, 20, 30]
    some = torch.cat([batch.targets.flatten() for batch in mixture.evaluation_batches(2, 60)])
    assert (some // 10_000).bincount().tolist() == [10, 20, 30]
    assert mixture.evaluation_tokens(1) == [1, 1, 1]
    assert mixture.evaluation_tokens(10**9) == [50, 100, 150]


# ---------------------------------------------------------------- a corpus sorted by source

SOURCES, ROWS_OF_A_STEP, STEPS = (0.5, 0.25, 0.15, 0.1), 64, 30


def chi_squared(counts: Sequence[Sequence[int]]) -> float:
    """Of rows per step and source, against the mixture of the whole."""
    return sum(
        (count - ROWS_OF_A_STEP * share) ** 2 / (ROWS_OF_A_STEP * share)
        for step in counts
        for count, share in zip(step, SOURCES, strict=True)
    )


def count_sources(rows: Sequence[torch.Tensor]) -> list[list[int]]:
    return [step[:, 0].bincount(minlength=len(SOURCES)).tolist() for step in rows]


def test_each_step_of_a_sorted_corpus_has_the_mixture_of_the_whole(tmp_path: Path, prepared: Prepare) -> None:
    """All of one source, then all of the next; an id says which. The loss must not show the shards."""
    length, windows = 16, STEPS * ROWS_OF_A_STEP
    ids = [source for source, share in enumerate(SOURCES) for _ in range(round(share * windows * length))]
    prepared(tmp_path, ids, shard_tokens=2000)
    stream = TokenStream(tmp_path, tokens_per_row=length, seed=1337)
    # Sources x steps, less one each since rows are drawn without putting back, are independent.
    freedom = (len(SOURCES) - 1) * (STEPS - 1)
    limit = freedom + 4 * math.sqrt(2 * freedom)
    for epoch in range(3):
        first = epoch * windows
        steps = [stream.batch(first + step * ROWS_OF_A_STEP, ROWS_OF_A_STEP).ids for step in range(STEPS)]
        assert chi_squared(count_sources(steps)) < limit
    in_order = [batch.ids for batch in stream.evaluation_batches(ROWS_OF_A_STEP)]
    assert chi_squared(count_sources(in_order[: STEPS - 1])) > 10 * limit  # the negative control
