from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.permutation import build_permutation, derive_keys

seeds = st.integers(-(2**70), 2**70)


@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
def test_it_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = build_permutation(size, seed, epoch)
    assert sorted(order(index) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1000, 58_594])
def test_each_seed_and_epoch_has_its_own_order(size: int) -> None:
    orders = {
        tuple(build_permutation(size, seed, epoch)(index) for index in range(20))
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_it_is_a_pure_function() -> None:
    first = build_permutation(1000, 7, 3)
    backwards = {index: first(index) for index in reversed(range(1000))}
    assert backwards == {index: build_permutation(1000, 7, 3)(index) for index in range(1000)}


def test_every_order_of_four_things_occurs_about_equally_often() -> None:
    counts = Counter(
        tuple(order(index) for index in range(4))
        for order in (build_permutation(4, seed, 0) for seed in range(4800))
    )
    # 24 orders, 200 of each expected. A Feistel network on so small a grid leaves some bias; none is rare.
    assert len(counts) == 24
    assert min(counts.values()) > 100
    assert max(counts.values()) < 400


def test_every_place_is_taken_by_every_thing_equally_often() -> None:
    size, trials = 13, 2600
    counts = Counter()
    for seed in range(trials):
        order = build_permutation(size, seed, 1)
        counts.update((index, order(index)) for index in range(size))
    expected = trials / size
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(size) for j in range(size))
    # 144 degrees of freedom: mean 144, standard deviation 17.
    assert chi_square < 144 + 5 * 17


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 10_000
    order = build_permutation(size, 1, 0)
    places = [order(index) for index in range(size)]
    steps = [abs(a - b) for a, b in zip(places, places[1:], strict=False)]
    # Two places drawn at random lie size / 3 apart on average.
    assert abs(sum(steps) / len(steps) - size / 3) < size / 50
    assert sum(step == 1 for step in steps) < 10


@given(size=st.integers(1, 2**62), seed=seeds, epoch=st.integers(0, 2**40), data=st.data())
def test_many_at_once_are_the_same(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = build_permutation(size, seed, epoch)
    first = data.draw(st.integers(0, size - 1))
    count = min(20, size - first)
    assert order.at(first, count).tolist() == [order(first + place) for place in range(count)]


def test_many_at_once_walk_back_below_the_size() -> None:
    order = build_permutation(10_101, 3, 0)  # of a grid of 101 x 101: 100 cells are spare
    assert any(order._scramble(index) >= 10_101 for index in range(10_101))
    assert order.at(0, 10_101).tolist() == [order(index) for index in range(10_101)]


def test_large_sizes_cost_nothing() -> None:
    size = 10**15
    order = build_permutation(size, 0, 0)
    places = [order(index) for index in range(1000)]
    assert len(set(places)) == 1000
    assert all(0 <= place < size for place in places)


def test_keys_depend_on_seed_epoch_and_purpose() -> None:
    keys = [
        derive_keys(*of, 2) for of in ((1, 0, "order"), (0, 1, "order"), (1, 0, "shift"), (1, 1, "order"))
    ]
    assert len(set(keys)) == 4
    assert derive_keys(1, 0, "order", 2) == keys[0]
