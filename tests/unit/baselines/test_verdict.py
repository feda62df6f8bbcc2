import math

import pytest

from overnight.baselines.band import ReferenceBand, columns_of, run_curves
from overnight.baselines.verdict import compare_with_band

ENDS = [64 * step for step in (1, 2, 4, 8, 16, 32, 48, 64)]
SETTINGS = {"dropout": 0.0, "peak_learning_rate": 1e-3, "evaluation_tokens": None}


def lines(shift=0.0, steps=64, since=0, **changes):
    return [
        {
            **{"step": step, "tokens": 64 * step, "loss": 2 + 6 / step + (shift if step > since else 0.0)},
            **{"grad_norm": 1.0, "learning_rate": 1e-3, **changes},
        }
        for step in range(1, steps + 1)
    ]


def evaluations(shift=0.0, steps=64, norm_gain=1.0):
    return [
        {
            **{"step": step, "tokens": 64 * step, "loss": 2.1 + 6 / max(1, step) + shift},
            "norm_gain": norm_gain,
        }
        for step in range(0, steps + 1, 16)
    ]


@pytest.fixture
def band(programs):
    runs = [run_curves(columns_of(lines(shift)), evaluations(shift), ENDS) for shift in (-0.01, 0.0, 0.01)]
    return ReferenceBand(
        recipe="small",
        source="3 runs",
        date="2026-11-21",
        identity={},
        settings=SETTINGS,
        text={},
        unigram_nats=None,
        curves=programs["bands"].record_curves(runs),
    )


@pytest.fixture
def compare(band):
    return lambda metrics, judged, **settings: compare_with_band(
        band, columns_of(metrics), judged, SETTINGS | settings
    )


def test_run_like_the_reference_is_within(compare):
    found = compare(lines(0.005), evaluations(0.005))
    assert (found.position, found.is_on_track, found.since_tokens) == ("within", True, None)
    assert (found.curve, found.latest.tokens) == ("validation loss", 4096)
    assert found.brief() == {"on_track": "within", "likely_mistake": None}
    (sentence,) = found.sentences()
    assert sentence.startswith("within its reference (small, 3 runs): validation loss 2.199 at 4,096 tokens")


@pytest.mark.parametrize("shift, position", [(0.5, "above"), (-0.15, "below")])
def test_run_off_its_reference(compare, shift, position):
    found = compare(lines(shift), evaluations(shift), dropout=0.1)
    assert (found.position, found.word, found.is_on_track) == (position, position, False)
    assert [*found.causes][:1] in ([], ["the initial weights are different"])
    assert "dropout is 0.1, and 0.0" in found.sentences()[1]
    assert "dropout is 0.1" in found.line()
    assert len(compare(lines(), evaluations(), dropout=0.1).sentences()) == 1, "only if the run is off"


def test_since_when_a_run_is_off(compare):
    found = compare(lines(0.5, since=20), [])
    assert (found.position, found.curve, found.since_tokens) == ("above", "training loss", 2048)
    assert "2,048 tokens" in found.sentences()[0]
    without_cause = compare(lines(0.2, since=20), evaluations()[:1])
    assert (without_cause.causes, len(without_cause.sentences())) == ({}, 2)


def test_running_run_is_compared_as_far_as_it_has_come(compare):
    found = compare(lines(0.5, steps=40), evaluations(0.5, steps=32))
    assert (found.position, found.latest.tokens) == ("above", 32 * 64)
    assert compare([], []) is None
    at_start = compare([], evaluations(steps=0))
    assert (at_start.position, at_start.latest.tokens) == ("within", 0)


def test_another_validation_text_is_not_compared(compare):
    found = compare(lines(), evaluations(0.5), evaluation_tokens=64)
    assert (found.position, found.curve) == ("within", "training loss")
    assert compare(lines(), evaluations(0.5)).position == "above"  # the control


OTHER_RATE = (lines(learning_rate=1e-2), [])
SUMMED = (lines(grad_norm=4.0), [])
# Each run is within the band by its losses, but for the loss that is not finite.
MISTAKES = {
    "layer norms are decayed": (lines(), evaluations(norm_gain=0.8)),
    "gradients explode": (lines(math.nan, since=50), []),
    "the learning rate is off by a factor": OTHER_RATE,
    "the learning-rate schedule is off": (
        lines(),
        [line | {"applied_learning_rate": 1e-3 * line["step"]} for line in evaluations()],
    ),
    "gradients are summed over micro-batches, not averaged": SUMMED,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_within_the_band_is_suspect(compare, name):
    found = compare(*MISTAKES[name], tokens_per_step=1024, micro_batch_size=8, context_length=32)
    word = "above" if name == "gradients explode" else "suspect"
    assert found.brief() == {"on_track": word, "likely_mistake": name}
    assert f"; likeliest: {name}" in found.line()


def test_learning_rate_that_the_recipe_asks_for_is_no_mistake(compare):
    assert compare(*OTHER_RATE, peak_learning_rate=1e-2).is_on_track


def test_micro_batches_of_an_incomplete_recipe_are_unknown(compare):
    assert compare(*SUMMED).brief()["likely_mistake"] == "gradients are scaled and not scaled back"
