from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.model.model_config import PRESETS
from overnight.training.ownership import assign_parameters, largest_share

SIZES = st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=12)


def assign_naively(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """The same in words: as long as one is left, take the first of the largest, give it to the poorest."""
    left, owned = dict(sizes), {rank: 0 for rank in range(ranks)}
    owner = {}
    while left:
        largest = next(name for name, size in left.items() if size == max(left.values()))
        poorest = min(owned, key=lambda rank: (owned[rank], rank))
        owner[largest] = poorest
        owned[poorest] += left.pop(largest)
    return owner


def test_the_largest_goes_first_and_ties_to_the_lowest_rank() -> None:
    sizes = {"a": 3, "b": 5, "c": 5, "d": 1}
    assert assign_parameters(sizes, 2) == {"b": 0, "c": 1, "a": 0, "d": 1}
    assert assign_parameters(sizes, 3) == {"b": 0, "c": 1, "a": 2, "d": 2}
    assert assign_parameters(sizes, 1) == dict.fromkeys(sizes, 0)
    assert assign_parameters({}, 2) == {}


@given(SIZES, st.integers(1, 5))
def test_it_is_what_the_naive_twin_does(sizes: dict[str, int], ranks: int) -> None:
    assert assign_parameters(sizes, ranks) == assign_naively(sizes, ranks)
    assert list(assign_parameters(sizes, ranks)) == list(sizes), "in their order"


@given(SIZES.filter(bool), st.integers(1, 5))
def test_no_rank_has_more_than_its_share_and_one_parameter(sizes: dict[str, int], ranks: int) -> None:
    most = largest_share(sizes, ranks)
    assert sum(sizes.values()) / ranks <= most <= sum(sizes.values()) / ranks + max(sizes.values())


@given(SIZES, st.integers(1, 4))
def test_equal_parameters_may_change_places_but_no_share_grows(sizes: dict[str, int], ranks: int) -> None:
    names = [*sizes]
    for order in itertools.islice(itertools.permutations(names), 24):
        assert largest_share({name: sizes[name] for name in order}, ranks) == largest_share(sizes, ranks)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_gpt2_s_parameters_are_divided_about_evenly(ranks: int) -> None:
    """One that is larger than a share, the embedding, is one's whole share; else it is within a tenth."""
    for name in ("gpt2-124m", "gpt2-1558m", "gpt3-13b"):
        shapes = PRESETS[name].parameter_shapes()
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        even = sum(sizes.values()) / ranks
        assert largest_share(sizes, ranks) <= max(1.1 * even, *sizes.values())


def test_there_is_at_least_one_rank() -> None:
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        assign_parameters({"a": 1}, 0)
