"""ZeRO-1's owners of parameters, against a naive twin."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.model.gpt import parameter_shapes
from overnight.model.model_config import PRESETS
from overnight.training.sharding import assign_parameters, largest_share

SIZES = st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=12)


def assign_naively(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """While any is left: the first of the largest goes to the rank that owns least."""
    left, owned = dict(sizes), {rank: 0 for rank in range(ranks)}
    owner = {}
    while left:
        largest = next(name for name, size in left.items() if size == max(left.values()))
        least = min(owned, key=lambda rank: (owned[rank], rank))
        owner[largest] = least
        owned[least] += left.pop(largest)
    return owner


def test_largest_is_assigned_first_and_ties_to_the_lowest_rank():
    sizes = {"a": 3, "b": 5, "c": 5, "d": 1}
    assert assign_parameters(sizes, 2) == {"b": 0, "c": 1, "a": 0, "d": 1}
    assert assign_parameters(sizes, 3) == {"b": 0, "c": 1, "a": 2, "d": 2}
    assert assign_parameters(sizes, 1) == dict.fromkeys(sizes, 0)
    assert assign_parameters({}, 2) == {}


@given(SIZES, st.integers(1, 5))
def test_assignment_equals_the_naive_twin(sizes, ranks):
    assert assign_parameters(sizes, ranks) == assign_naively(sizes, ranks)
    assert list(assign_parameters(sizes, ranks)) == list(sizes), "in their order"


@given(SIZES.filter(bool), st.integers(1, 5))
def test_largest_share_is_bounded(sizes, ranks):
    most = largest_share(sizes, ranks)
    assert sum(sizes.values()) / ranks <= most <= sum(sizes.values()) / ranks + max(sizes.values())


@given(SIZES, st.integers(1, 4))
def test_order_of_parameters_does_not_change_the_largest_share(sizes, ranks):
    names = [*sizes]
    for order in itertools.islice(itertools.permutations(names), 24):
        assert largest_share({name: sizes[name] for name in order}, ranks) == largest_share(sizes, ranks)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_gpt2_parameters_are_divided_evenly(ranks):
    """Within a tenth, unless one parameter, the embedding, is larger than a share."""
    for name in ("gpt2-124m", "gpt2-1558m", "gpt3-13b"):
        sizes = {each: math.prod(shape) for each, shape in parameter_shapes(PRESETS[name]).items()}
        even = sum(sizes.values()) / ranks
        assert largest_share(sizes, ranks) <= max(1.1 * even, *sizes.values())


def test_ranks_must_be_positive():
    with pytest.raises(ValueError, match="ranks=0"):
        assign_parameters({"a": 1}, 0)
