"""Collectives give every process the same result."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

SIZES = [2, pytest.param(4, marks=pytest.mark.distributed)]


def add(one: Any, other: Any) -> Any:
    """The sum of two lists of tensors, as lists."""
    return [(torch.tensor(a) + torch.tensor(b)).tolist() for a, b in zip(one, other, strict=True)]


def add_neighbours(terms: list[Any]) -> Any:
    """Neighbours first, then pairs of neighbours, and so on."""
    while len(terms) > 1:
        terms = [add(terms[index], terms[index + 1]) for index in range(0, len(terms), 2)]
    return terms[0]


@pytest.mark.parametrize("bucket_bytes", [10**6, 1, 30, 700])
def test_all_reduce(team, bucket_bytes):
    """One bucket for all tensors, one for each, and some that end between and within them."""
    before, after = zip(*team("collect", "all_reduce", bucket_bytes, size=2), strict=True)
    assert after == (add(*before),) * 2


@pytest.mark.parametrize("size", SIZES)
def test_broadcast(team, size):
    for owner in (0, size - 1):
        before, after = zip(*team("collect", "broadcast", 30, owner, size=size), strict=True)
        assert after == (before[owner],) * size
        assert before[0] != before[-1]


@pytest.mark.parametrize("size", [2, 4])
def test_tree_all_reduce_adds_neighbours_first(team, size):
    before, after = zip(*team("collect", "tree_all_reduce", 30, size=size), strict=True)
    assert after == (add_neighbours([*before]),) * size
    in_order = functools.reduce(add, before)
    assert (after[0] == in_order) == (size == 2), "negative control: another order of four terms"


@pytest.mark.parametrize("size", [1, *SIZES])
def test_any_and_all_gather_object(team, size):
    machines = max(1, size // 2)
    answers = team("describe_world", size=size, machines=machines)
    local_size = size // machines
    for rank, answer in enumerate(answers):
        assert answer["place"] == (rank, size, rank % local_size, local_size, "cpu")
        assert answer["any"] == [False, True, True]
        assert answer["gather"] == [f"I am {each}" * (1 + 100 * each) for each in range(size)]


@pytest.mark.parametrize(
    "errors, message",
    [
        ([None, None], "nothing"),
        (["too large", "too large"], "too large"),
        ([None, "too large"], "rank 1: too large"),
        (["too small", "too large"], "rank 0: too small; rank 1: too large"),
    ],
)
def test_raise_together(team, errors, message):
    assert team("raise_in_some", errors, size=2) == [message, message]


def srun(rank: int, size: int, local_size: int, _port: int) -> dict[str, str]:
    """The variables that Slurm sets for the tasks of a step; the port follows from the job's number."""
    variables = {
        "SLURM_STEP_NUM_TASKS": size,
        "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{size // local_size})",
    }
    variables |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % local_size}
    variables |= {"SLURM_JOB_ID": 4_000_000 + os.getpid(), "SLURM_STEP_NODELIST": "localhost"}
    return {name: str(value) for name, value in variables.items()}


def test_slurm_tasks_meet(team):
    answers = team("describe_world", size=2, machines=2, launcher=srun)
    assert [answer["place"] for answer in answers] == [(0, 2, 0, 1, "cpu"), (1, 2, 0, 1, "cpu")]
    assert answers[0]["gather"] == answers[1]["gather"]
