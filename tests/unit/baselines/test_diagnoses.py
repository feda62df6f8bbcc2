"""Each diagnosis on invented numbers that show the mistake, and on controls that do not."""

import math
import re

import pytest

from overnight.baselines.band import BandPoint
from overnight.baselines.diagnoses import DIAGNOSES, Deviation, RunStats


def around(middle, share=0.02):
    return BandPoint(middle * (1 - share), middle, middle * (1 + share))


def compared(values, middles, share=0.02):
    """Points at 0, 1000, 2000, ... tokens."""
    pairs = enumerate(zip(values, middles, strict=True))
    return [Deviation(1000 * at, value, around(middle, share)) for at, (value, middle) in pairs]


def applied(*factors):
    return compared(factors, [1.0] * len(factors), 0.03)


def norms(factor):
    return compared([2.0 * factor, 0.5 * factor, 0.4 * factor], [2.0, 0.5, 0.4], 0.2)


def losses(last, middle=3.0, first=8.0):
    return compared([first, last], [8.0, middle])


def gap(value):
    return [Deviation(2000, value, BandPoint(-0.02, 0.0, 0.02))]


def stats_with(micro_batches=8, **curves):
    """The statistics of a healthy run, but for these."""
    healthy = {
        "loss": compared([8.0, 4.01, 3.0], [8.0, 4.0, 3.0]),
        "validation_loss": compared([8.0, 4.0, 3.01], [8.0, 4.0, 3.0]),
        "gap": gap(0.01),
        "grad_norm": compared([2.1, 0.5, 0.4], [2.0, 0.5, 0.4], 0.2),
        "grad_norm_peak": compared([2.1, 0.9, 0.8], [2.0, 0.9, 0.7], 0.3),
        "learning_rate": compared([1e-3, 1e-3, 1e-4], [1e-3, 1e-3, 1e-4]),
        "applied_rate": applied(1.0, 1.0),
        "norm_gain": compared([1.0, 1.05, 1.1], [1.0, 1.05, 1.1]),
        "residual_ratio": compared([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]),
    }
    return RunStats(curves=healthy | curves, micro_batches=micro_batches, unigram_nats=6.0)


# A word of the diagnosis' name, numbers that show the mistake, and what the evidence says.
OFF = [
    ("factor", stats_with(learning_rate=compared([1e-2, 1e-3], [1e-3, 1e-4])), "10 times"),
    ("factor", stats_with(applied_rate=applied(0.1, 0.1)), "0.1 times"),
    (
        "schedule",
        stats_with(learning_rate=compared([1e-3] * 3, [1e-3, 1e-3, 1e-4])),
        "2,000 .*0.001.* 0.0001",
    ),
    ("schedule", stats_with(applied_rate=applied(1.0, 4.0)), "1 to 4 times"),
    ("residual", stats_with(residual_ratio=compared([1.0], [0.5])), "1 times .*0.5 times"),
    ("initial weights", stats_with(loss=losses(4.0, 4.0, first=20.0)), "20, the reference's"),
    ("summed", stats_with(grad_norm=norms(8.2)), "8 micro-batches"),
    ("scaled", stats_with(grad_norm=norms(1024.0)), "1.02e.03 times"),
    ("scaled", stats_with(grad_norm=norms(0.125)), "0.125 times"),
    ("explode", stats_with(grad_norm_peak=compared([2.0, 900.0], [2.0, 0.9])), "900 before 1,000"),
    ("explode", stats_with(loss=losses(math.inf)), "not finite after 1,000"),
    ("norms", stats_with(norm_gain=compared([1.0, 0.9], [1.0, 1.1])), "0.9, the reference's"),
    ("sees", stats_with(loss=losses(1.0, 4.0), validation_loss=losses(1.1, 4.0)), "1 and 1.1, .* 4 and 4"),
    ("repeats", stats_with(loss=losses(2.0), gap=gap(2.0)), r"\+2.000 .* -0.020 to \+0.020"),
    ("dropout", stats_with(loss=losses(3.3), gap=gap(-0.1)), "-0.100"),
    ("shuffled", stats_with(loss=losses(5.9)), "5.9.* the 6 .* 3$"),
]

CONTROLS = [
    # The weights of a run that starts from a checkpoint do not show how they were drawn.
    ("residual", stats_with(residual_ratio=[Deviation(5000, 1.0, around(0.5))])),
    # A norm that is off later, or together with the loss, is not a matter of scale.
    ("scaled", stats_with(grad_norm=compared([2.0, 9.0, 9.0], [2.0, 0.5, 0.4], 0.2))),
    ("scaled", stats_with(grad_norm=norms(8.0), loss=losses(4.0, first=20.0))),
    ("summed", stats_with(grad_norm=norms(7.0))),
    ("summed", stats_with(1, grad_norm=norms(8.0))),
    # A gradient that is scaled from the start does not explode.
    ("explode", stats_with(grad_norm=norms(100.0), grad_norm_peak=compared([200.0], [2.0]))),
    ("explode", stats_with(grad_norm_peak=compared([2.0, 4.0], [2.0, 0.9]))),
    # A little below is luck, or a better machine.
    ("sees", stats_with(loss=losses(2.9), validation_loss=losses(2.9))),
    # A gap has two sides: the training loss must be off the same way.
    ("repeats", stats_with(loss=losses(3.5), gap=gap(0.5))),
    ("dropout", stats_with(loss=losses(2.5), gap=gap(-0.5))),
    # Half-way between is slow learning; early on, the reference itself is no better.
    ("shuffled", stats_with(loss=losses(4.5))),
    ("shuffled", stats_with(loss=losses(5.9, 5.8))),
]

EVIDENCE = {diagnosis.name: diagnosis.evidence for diagnosis in DIAGNOSES}


def named(word):
    (name,) = [name for name in EVIDENCE if word in name]
    return name


@pytest.mark.parametrize("word, stats, numbers", OFF)
def test_mistake_is_the_first_diagnosis_and_has_its_numbers(word, stats, numbers):
    found = {name: evidence(stats) for name, evidence in EVIDENCE.items()}
    assert re.search(numbers, found[named(word)] or ""), found
    assert next(name for name in found if found[name] is not None) == named(word)


@pytest.mark.parametrize("word, stats", CONTROLS)
def test_what_only_looks_like_a_mistake_is_not_diagnosed(word, stats):
    assert EVIDENCE[named(word)](stats) is None


@pytest.mark.parametrize("name", EVIDENCE)
def test_healthy_or_unknown_run_has_no_diagnosis(name):
    assert name in {named(word) for word, _, _ in OFF}, "every diagnosis is tested"
    assert EVIDENCE[name](stats_with()) is None
    assert EVIDENCE[name](RunStats(curves={}, micro_batches=None, unigram_nats=None)) is None
