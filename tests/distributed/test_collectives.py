"""What processes say to each other arrives, and whoever is left alone ends."""

from __future__ import annotations

import math
import os
import re
import time
from typing import Any

import pytest
import torch

SIZES = [2, pytest.param(4, marks=pytest.mark.distributed)]
SHAPES = [(), (3,), (2, 5), (1,), (40, 4), (0,), (7,)]


def own_tensors(rank: int) -> list[torch.Tensor]:
    """As each process draws them."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) * 10**rank for shape in SHAPES]


def as_lists(tensors: list[torch.Tensor]) -> list[Any]:
    return [tensor.tolist() for tensor in tensors]


def pairwise(terms: list[torch.Tensor]) -> torch.Tensor:
    """Neighbours first, then pairs of neighbours, and so on."""
    while len(terms) > 1:
        terms = [terms[place] + terms[place + 1] for place in range(0, len(terms), 2)]
    return terms[0]


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("bucket_bytes", [None, 1, 30, 700])
def test_tensors_are_added_up_whatever_a_bucket_holds(team: Any, bucket_bytes: int | None) -> None:
    """One bucket for all, one for each tensor, and some that end between and within them."""
    found = team("say_all", "sum", bucket_bytes, size=2)
    one, two = own_tensors(0), own_tensors(1)
    expected = as_lists([mine + theirs for mine, theirs in zip(one, two, strict=True)])
    assert found == [expected, expected]


@pytest.mark.parametrize("size", SIZES)
def test_an_owner_s_tensors_are_everybody_s(team: Any, size: int) -> None:
    for owner in (0, size - 1):
        assert team("say_all", "spread", 30, owner, size=size) == [as_lists(own_tensors(owner))] * size


@pytest.mark.parametrize("size", [2, 4])
def test_a_tree_adds_neighbours_first(team: Any, size: int) -> None:
    found = team("say_all", "sum_in_tree", 30, size=size)
    terms = [list(each) for each in zip(*map(own_tensors, range(size)), strict=True)]
    assert found == [as_lists([pairwise(each) for each in terms])] * size
    in_order = as_lists([sum(each[1:], each[0]) for each in terms])
    assert (found[0] == in_order) == (size == 2), "with four, another order is rounded otherwise"


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_s_tree_is_the_same_whoever_computes_its_micro_batches(team: Any, size: int) -> None:
    (alone,) = team("add_up_in_tree", 12, size=1)
    assert team("add_up_in_tree", 12, size=size) == [alone] * size


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("size", SIZES)
def test_small_questions_are_answered_the_same_everywhere(team: Any, size: int) -> None:
    answers = team("find_out", size=size, machines=size // 2)
    for rank, answer in enumerate(answers):
        assert answer["place"] == (rank, size, rank % 2, 2, "cpu")
        assert answer["any"] == [False, True, True]
        assert answer["gather"] == [f"I am {each}" * (1 + 100 * each) for each in range(size)]


@pytest.mark.parametrize(
    "refusals, said",
    [
        ([None, None], "nothing"),
        (["too large", "too large"], "too large"),
        ([None, "too large"], "rank 1: too large"),
        (["too small", "too large"], "rank 0: too small; rank 1: too large"),
    ],
)
def test_what_one_refuses_all_refuse(team: Any, refusals: list[str | None], said: str) -> None:
    assert team("refuse", refusals, size=2) == [said, said]


def srun(rank: int, size: int, local_size: int, _port: int) -> dict[str, str]:
    """What Slurm tells the tasks of a step, on nodes of this name; the port follows from the job."""
    told = {"SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{size // local_size})"}
    told |= {
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % local_size,
        "SLURM_JOB_ID": 4_000_000 + os.getpid(),
    }
    return {name: str(value) for name, value in told.items()} | {"SLURM_STEP_NODELIST": "localhost"}


def test_tasks_of_slurm_find_each_other(team: Any) -> None:
    answers = team("find_out", size=2, machines=2, launcher=srun)
    assert [answer["place"] for answer in answers] == [(0, 2, 0, 1, "cpu"), (1, 2, 0, 1, "cpu")]
    assert answers[0]["gather"] == answers[1]["gather"]


# ---------------------------------------------------------------- left alone


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.distributed)])
def test_who_waits_for_one_that_died_ends_with_a_sentence(team: Any, rank: int) -> None:
    team("find_out", size=2)  # what forks processes has been started
    started_at = time.monotonic()
    found = team.outcomes("leave", rank, "killed", size=2)
    assert time.monotonic() - started_at < 10
    assert found[rank] == ("ended", -9)
    how, words = found[1 - rank]
    assert how == "LostOthersError"
    assert re.fullmatch(rf"rank {1 - rank} has lost the others \([\w .:\[\]]+\)", words)


def test_an_error_of_one_is_its_own_and_the_others_lose_it(team: Any) -> None:
    found = team.outcomes("leave", 1, "broken", size=2)
    assert found[1] == ("RuntimeError", "an error that nobody foresaw")
    assert found[0][0] == "LostOthersError"


def test_one_process_that_a_launcher_started_joins_itself(team: Any) -> None:
    (answer,) = team("find_out", size=1)
    assert answer["place"] == (0, 1, 0, 1, "cpu")
    assert answer["any"] == [False, True, True]
    assert answer["gather"] == ["I am 0"]


def test_the_sums_above_are_rounded() -> None:
    """The negative control: terms whose sum is exact in any order would prove nothing."""
    terms = [tensors[4].double() for tensors in map(own_tensors, range(4))]
    exact = [math.fsum(each) for each in zip(*(term.flatten().tolist() for term in terms), strict=True)]
    rounded = pairwise([tensors[4] for tensors in map(own_tensors, range(4))]).flatten().tolist()
    assert exact != rounded
