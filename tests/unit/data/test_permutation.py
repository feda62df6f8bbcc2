from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.permutation import Permutation, build_permutation, derive_keys

seeds = st.integers(-(2**70), 2**70)


def naive(order: Permutation, index: int) -> int:
    """The value at one index, in Python's unlimited integers."""

    def mix(number: int) -> int:
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
        return number ^ (number >> 31)

    while True:
        row, column = divmod(index, order.columns)
        for number in range(0, len(order.keys), 2):
            column = (column + mix(row ^ order.keys[number])) % order.columns
            row = (row + mix(column ^ order.keys[number + 1])) % order.rows
        index = row * order.columns + column
        if index < order.size:
            return index


@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    values = build_permutation(size, seed, epoch).at(0, size)
    assert np.array_equal(np.sort(values), np.arange(size))


@given(size=st.integers(1, 2**62), seed=seeds, epoch=st.integers(0, 2**40), data=st.data())
def test_permutation_equals_naive_twin(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = build_permutation(size, seed, epoch)
    first = data.draw(st.integers(0, size - 1))
    count = min(20, size - first)
    assert order.at(first, count).tolist() == [naive(order, first + place) for place in range(count)]


@pytest.mark.parametrize("size", [1000, 58_594, 10**15])
def test_permutation_differs_by_seed_and_epoch(size: int) -> None:
    orders = {
        tuple(build_permutation(size, seed, epoch).at(0, 20)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100
    assert len({derive_keys(*of, 2) for of in ((1, 0, "a"), (0, 1, "a"), (1, 0, "b"), (1, 1, "a"))}) == 4


def test_every_value_occurs_equally_often_at_every_index() -> None:
    size, trials = 13, 2600
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), build_permutation(size, seed, 1).at(0, size)] += 1
    chi_squared = ((counts - trials / size) ** 2 / (trials / size)).sum()
    # 144 degrees of freedom: mean 144, standard deviation 17.
    assert chi_squared < 144 + 5 * 17
