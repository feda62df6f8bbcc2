"""Each mistake on made-up numbers that show it, beside a control that does not."""

import dataclasses
import math
import re
from typing import Any

import pytest

from overnight.baselines import diagnoses
from overnight.baselines.band import BandPoint
from overnight.baselines.diagnoses import MISTAKES, Deviation, RunStats, count_micro_batches


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
SEEN = RunStats(
    curves=HEALTHY, applied_rates=[1.0, 1.0], is_same_schedule=True, micro_batches=8, unigram_nats=6.0
)


def seen(facts: dict[str, Any] | None = None, **curves: list[Deviation]) -> RunStats:
    return dataclasses.replace(SEEN, curves=HEALTHY | curves, **(facts or {}))


def norms(factor: float) -> list[Deviation]:
    return compared([2.0 * factor, 0.5 * factor, 0.4 * factor], [2.0, 0.5, 0.4], 0.2)


OFF = [
    (
        "the learning rate is off by a factor",
        seen(learning_rate=compared([1e-2, 1e-3], [1e-3, 1e-4])),
        "10 times",
    ),
    ("the learning rate is off by a factor", seen({"applied_rates": [0.1, 0.1]}), "uses 0.1 times"),
    (
        "the learning-rate schedule is off",
        seen(learning_rate=compared([1e-3, 1e-3, 1e-3], [1e-3, 1e-3, 1e-4])),
        r"from 2,000 tokens on .*now 0.001, reference 0.0001",
    ),
    ("the learning-rate schedule is off", seen({"applied_rates": [1.0, 4.0]}), "1 to 4 times the one"),
    (
        "the initialisation lacks the residual scale",
        seen(residual_ratio=compared([1.0], [0.5])),
        "spread 1 times as wide as c_fc's, the reference's 0.5",
    ),
    (
        "the weights begin otherwise",
        seen(loss=compared([20.0, 4.0], [8.0, 4.0])),
        "loss is 20, the reference's",
    ),
    (
        "gradients are summed over micro-batches, not averaged",
        seen(grad_norm=norms(8.2)),
        "has 8 micro-batches",
    ),
    ("gradients are scaled and not scaled back", seen(grad_norm=norms(1024.0)), "1.02e.03 times"),
    ("gradients are scaled and not scaled back", seen(grad_norm=norms(0.125)), "0.125 times"),
    (
        "gradients explode",
        seen(grad_norm_peak=compared([2.0, 900.0], [2.0, 0.9])),
        "reached 900 before 1,000",
    ),
    ("gradients explode", seen(loss=compared([8.0, math.inf], [8.0, 4.0])), "not finite after 1,000"),
    (
        "layer norms are decayed",
        seen(norm_gain=compared([1.0, 0.9], [1.0, 1.1])),
        "gain is 0.9, the reference's",
    ),
    (
        "the model sees what it is to predict",
        seen(loss=compared([8.0, 1.0], [8.0, 4.0]), validation_loss=compared([8.0, 1.1], [8.0, 4.0])),
        "1 and 1.1, far below the reference's 4 and 4",
    ),
    (
        "the training data repeats",
        seen(loss=compared([8.0, 2.0], [8.0, 3.0]), gap=[Deviation(2000, 2.0, GAP)]),
        r"\+2.000 nats .* -0.020 to \+0.020",
    ),
    (
        "dropout is on",
        seen(loss=compared([8.0, 3.3], [8.0, 3.0]), gap=[Deviation(2000, -0.1, GAP)]),
        "-0.100 nats",
    ),
    ("tokens are shuffled within rows", seen(loss=compared([8.0, 5.9], [8.0, 3.0])), "near the 6 of knowing"),
]


@pytest.mark.parametrize("name, shown, words", OFF)
def test_a_mistake_is_seen_with_its_numbers(name: str, shown: RunStats, words: str) -> None:
    found = {mistake.name: mistake.evidence(shown) for mistake in MISTAKES}
    assert found[name] is not None
    assert re.search(words, found[name] or ""), found[name]
    first = next(known for known in found if found[known] is not None)
    assert first == name, found


def test_every_mistake_has_its_numbers_here() -> None:
    assert {name for name, _, _ in OFF} == {mistake.name for mistake in MISTAKES}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_healthy_run_shows_none(mistake: diagnoses.Diagnosis) -> None:
    assert mistake.evidence(SEEN) is None


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_nothing_known_shows_none(mistake: diagnoses.Diagnosis) -> None:
    nothing = RunStats(
        curves={}, applied_rates=[], is_same_schedule=True, micro_batches=None, unigram_nats=None
    )
    assert mistake.evidence(nothing) is None


CONTROLS = [
    # Another rate that the recipe asks for is a difference, no mistake.
    (
        diagnoses.learning_rate_factor,
        seen({"is_same_schedule": False}, learning_rate=compared([1e-2], [1e-3])),
    ),
    (
        diagnoses.learning_rate_course,
        seen({"is_same_schedule": False}, learning_rate=compared([1e-3, 1e-2], [1e-3, 1e-3])),
    ),
    # A run that begins with a checkpoint's weights says nothing of how they were drawn.
    (diagnoses.residual_scale, seen(residual_ratio=[Deviation(5000, 1.0, around(0.5))])),
    # A norm that is off later, or together with the loss, is no matter of scale.
    (diagnoses.scaled_gradients, seen(grad_norm=compared([2.0, 9.0, 9.0], [2.0, 0.5, 0.4], 0.2))),
    (diagnoses.scaled_gradients, seen(grad_norm=norms(8.0), loss=compared([20.0], [8.0]))),
    (diagnoses.summed_gradients, seen(grad_norm=norms(7.0))),
    (diagnoses.summed_gradients, seen({"micro_batches": 1}, grad_norm=norms(8.0))),
    # A gradient that is scaled from the start does not explode.
    (diagnoses.explosion, seen(grad_norm=norms(100.0), grad_norm_peak=compared([200.0], [2.0]))),
    (diagnoses.explosion, seen(grad_norm_peak=compared([2.0, 4.0], [2.0, 0.9]))),
    # A little below is luck, or a better machine.
    (
        diagnoses.seen_future,
        seen(loss=compared([8.0, 2.9], [8.0, 3.0]), validation_loss=compared([8.0, 2.9], [8.0, 3.0])),
    ),
    # A gap has two sides: the training loss must be off the same way.
    (diagnoses.repeated_data, seen(loss=compared([8.0, 3.5], [8.0, 3.0]), gap=[Deviation(2000, 0.5, GAP)])),
    (diagnoses.dropout, seen(loss=compared([8.0, 2.5], [8.0, 3.0]), gap=[Deviation(2000, -0.5, GAP)])),
    # Half-way between is slow learning.
    (diagnoses.shuffled_tokens, seen(loss=compared([8.0, 4.5], [8.0, 3.0]))),
    # Early on, the reference itself knows no more.
    (diagnoses.shuffled_tokens, seen(loss=compared([8.0, 5.9], [8.0, 5.8]))),
]


@pytest.mark.parametrize("evidence, shown", CONTROLS)
def test_what_only_looks_like_it_is_not_named(evidence: Any, shown: RunStats) -> None:
    assert evidence(shown) is None


def test_micro_batches_follow_from_the_settings() -> None:
    settings = {"tokens_per_step": 1024, "micro_batch_size": 8, "context_length": 32}
    assert count_micro_batches(settings) == 4
    assert count_micro_batches(settings | {"micro_batch_size": None}) is None
