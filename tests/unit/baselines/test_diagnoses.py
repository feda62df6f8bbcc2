"""Each diagnosis on invented numbers that show the mistake, and on controls that do not."""

import dataclasses
import math
import re
from typing import Any

import pytest

from overnight.baselines.band import BandPoint
from overnight.baselines.diagnoses import DIAGNOSES, Deviation, RunStats, count_micro_batches


def around(middle: float, share: float = 0.02) -> BandPoint:
    return BandPoint(middle * (1 - share), middle, middle * (1 + share))


def compared(values: list[float], middles: list[float], share: float = 0.02) -> list[Deviation]:
    """Points at 0, 1000, 2000, ... tokens."""
    pairs = enumerate(zip(values, middles, strict=True))
    return [Deviation(1000 * at, value, around(middle, share)) for at, (value, middle) in pairs]


GAP = BandPoint(-0.02, 0.0, 0.02)
HEALTHY: dict[str, list[Deviation]] = {
    "loss": compared([8.0, 4.01, 3.0], [8.0, 4.0, 3.0]),
    "validation_loss": compared([8.0, 4.0, 3.01], [8.0, 4.0, 3.0]),
    "gap": [Deviation(2000, 0.01, GAP)],
    "grad_norm": compared([2.1, 0.5, 0.4], [2.0, 0.5, 0.4], 0.2),
    "grad_norm_peak": compared([2.1, 0.9, 0.8], [2.0, 0.9, 0.7], 0.3),
    "learning_rate": compared([1e-3, 1e-3, 1e-4], [1e-3, 1e-3, 1e-4]),
    "norm_gain": compared([1.0, 1.05, 1.1], [1.0, 1.05, 1.1]),
    "residual_ratio": compared([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]),
}
HEALTHY_STATS = RunStats(
    curves=HEALTHY, applied_rates=[1.0, 1.0], is_same_schedule=True, micro_batches=8, unigram_nats=6.0
)


def stats_with(facts: dict[str, Any] | None = None, **curves: list[Deviation]) -> RunStats:
    return dataclasses.replace(HEALTHY_STATS, curves=HEALTHY | curves, **(facts or {}))


def norms(factor: float) -> list[Deviation]:
    return compared([2.0 * factor, 0.5 * factor, 0.4 * factor], [2.0, 0.5, 0.4], 0.2)


OFF = [
    (
        "the learning rate is off by a factor",
        stats_with(learning_rate=compared([1e-2, 1e-3], [1e-3, 1e-4])),
        "10 times",
    ),
    ("the learning rate is off by a factor", stats_with({"applied_rates": [0.1, 0.1]}), "uses 0.1 times"),
    (
        "the learning-rate schedule is off",
        stats_with(learning_rate=compared([1e-3, 1e-3, 1e-3], [1e-3, 1e-3, 1e-4])),
        r"from 2,000 tokens on .*now 0.001, reference 0.0001",
    ),
    ("the learning-rate schedule is off", stats_with({"applied_rates": [1.0, 4.0]}), "1 to 4 times the one"),
    (
        "the initialisation lacks the residual scale",
        stats_with(residual_ratio=compared([1.0], [0.5])),
        "1 times .*0.5 times",
    ),
    (
        "the initial weights are different",
        stats_with(loss=compared([20.0, 4.0], [8.0, 4.0])),
        "loss is 20, the reference's",
    ),
    (
        "gradients are summed over micro-batches, not averaged",
        stats_with(grad_norm=norms(8.2)),
        "has 8 micro-batches",
    ),
    ("gradients are scaled and not scaled back", stats_with(grad_norm=norms(1024.0)), "1.02e.03 times"),
    ("gradients are scaled and not scaled back", stats_with(grad_norm=norms(0.125)), "0.125 times"),
    (
        "gradients explode",
        stats_with(grad_norm_peak=compared([2.0, 900.0], [2.0, 0.9])),
        "reached 900 before 1,000",
    ),
    ("gradients explode", stats_with(loss=compared([8.0, math.inf], [8.0, 4.0])), "not finite after 1,000"),
    (
        "layer norms are decayed",
        stats_with(norm_gain=compared([1.0, 0.9], [1.0, 1.1])),
        "gain is 0.9, the reference's",
    ),
    (
        "the model sees the tokens it predicts",
        stats_with(loss=compared([8.0, 1.0], [8.0, 4.0]), validation_loss=compared([8.0, 1.1], [8.0, 4.0])),
        "1 and 1.1, far below the reference's 4 and 4",
    ),
    (
        "the training data repeats",
        stats_with(loss=compared([8.0, 2.0], [8.0, 3.0]), gap=[Deviation(2000, 2.0, GAP)]),
        r"\+2.000 nats .* -0.020 to \+0.020",
    ),
    (
        "dropout is on",
        stats_with(loss=compared([8.0, 3.3], [8.0, 3.0]), gap=[Deviation(2000, -0.1, GAP)]),
        "-0.100 nats",
    ),
    (
        "tokens are shuffled within rows",
        stats_with(loss=compared([8.0, 5.9], [8.0, 3.0])),
        "5.9.* the 6 .* 3$",
    ),
]


EVIDENCE = {diagnosis.name: diagnosis.evidence for diagnosis in DIAGNOSES}


@pytest.mark.parametrize("name, stats, words", OFF)
def test_mistake_is_the_first_diagnosis_and_has_its_numbers(name: str, stats: RunStats, words: str) -> None:
    found = {name: evidence(stats) for name, evidence in EVIDENCE.items()}
    assert re.search(words, found[name] or ""), found[name]
    assert next(known for known in found if found[known] is not None) == name


def test_every_diagnosis_is_tested_and_has_a_control() -> None:
    assert {name for name, _, _ in OFF} == {*EVIDENCE}
    assert {name for name, _ in CONTROLS} <= {*EVIDENCE}


@pytest.mark.parametrize("name", EVIDENCE)
def test_healthy_or_unknown_run_has_no_diagnosis(name: str) -> None:
    assert EVIDENCE[name](HEALTHY_STATS) is None
    unknown: dict[str, Any] = {"curves": {}, "applied_rates": [], "micro_batches": None, "unigram_nats": None}
    assert EVIDENCE[name](RunStats(is_same_schedule=True, **unknown)) is None


CONTROLS = [
    # Another rate that the recipe asks for is a difference, not a mistake.
    (
        "the learning rate is off by a factor",
        stats_with({"is_same_schedule": False}, learning_rate=compared([1e-2], [1e-3])),
    ),
    (
        "the learning-rate schedule is off",
        stats_with({"is_same_schedule": False}, learning_rate=compared([1e-3, 1e-2], [1e-3, 1e-3])),
    ),
    # The weights of a run that starts from a checkpoint do not show how they were drawn.
    (
        "the initialisation lacks the residual scale",
        stats_with(residual_ratio=[Deviation(5000, 1.0, around(0.5))]),
    ),
    # A norm that is off later, or together with the loss, is not a matter of scale.
    (
        "gradients are scaled and not scaled back",
        stats_with(grad_norm=compared([2.0, 9.0, 9.0], [2.0, 0.5, 0.4], 0.2)),
    ),
    (
        "gradients are scaled and not scaled back",
        stats_with(grad_norm=norms(8.0), loss=compared([20.0], [8.0])),
    ),
    ("gradients are summed over micro-batches, not averaged", stats_with(grad_norm=norms(7.0))),
    (
        "gradients are summed over micro-batches, not averaged",
        stats_with({"micro_batches": 1}, grad_norm=norms(8.0)),
    ),
    # A gradient that is scaled from the start does not explode.
    ("gradients explode", stats_with(grad_norm=norms(100.0), grad_norm_peak=compared([200.0], [2.0]))),
    ("gradients explode", stats_with(grad_norm_peak=compared([2.0, 4.0], [2.0, 0.9]))),
    # A little below is luck, or a better machine.
    (
        "the model sees the tokens it predicts",
        stats_with(loss=compared([8.0, 2.9], [8.0, 3.0]), validation_loss=compared([8.0, 2.9], [8.0, 3.0])),
    ),
    # A gap has two sides: the training loss must be off the same way.
    (
        "the training data repeats",
        stats_with(loss=compared([8.0, 3.5], [8.0, 3.0]), gap=[Deviation(2000, 0.5, GAP)]),
    ),
    ("dropout is on", stats_with(loss=compared([8.0, 2.5], [8.0, 3.0]), gap=[Deviation(2000, -0.5, GAP)])),
    # Half-way between is slow learning.
    ("tokens are shuffled within rows", stats_with(loss=compared([8.0, 4.5], [8.0, 3.0]))),
    # Early on, the reference itself knows no more.
    ("tokens are shuffled within rows", stats_with(loss=compared([8.0, 5.9], [8.0, 5.8]))),
]


@pytest.mark.parametrize("name, stats", CONTROLS)
def test_what_only_looks_like_a_mistake_is_not_diagnosed(name: str, stats: RunStats) -> None:
    assert EVIDENCE[name](stats) is None


def test_micro_batches_follow_from_the_settings() -> None:
    settings = {"tokens_per_step": 1024, "micro_batch_size": 8, "context_length": 32}
    assert count_micro_batches(settings) == 4
    assert count_micro_batches(settings | {"micro_batch_size": None}) is None
