"""A run's reference on its page: one word, sentences where it is off, light areas behind its curves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from overnight.baselines.band import Curve, ReferenceBand
from overnight.report import plots, run_data
from overnight.report.page import report_page
from overnight.report.run_data import RunData, read_run

TOKENS = 524_288


def band(shift: float = 0.0, *names: str) -> ReferenceBand:
    """About where the run of `make_run` lies, or `shift` nats higher."""
    steps = (100, 200, 400, 800, 1600)
    losses = [3.05 + 2.6 / (1 + step / 60) ** 0.5 + shift for step in steps]
    curve = Curve(
        tokens=tuple(TOKENS * step for step in steps),
        low=tuple(loss - 0.3 for loss in losses),
        middle=tuple(losses),
        high=tuple(loss + 0.3 for loss in losses),
    )
    return ReferenceBand(
        recipe="night",
        source="3 recorded runs",
        date="2026-11-21",
        notes="On a quiet machine.",
        identity={},
        settings={"dropout": 0.1},
        text={},
        unigram_nats=None,
        curves=dict.fromkeys(names or ("loss", "validation_loss"), curve),
    )


def read_beside(run: Path, beside: ReferenceBand | None, patch: pytest.MonkeyPatch) -> RunData:
    patch.setattr(run_data, "find_band", lambda settings, text: beside)
    return read_run(run)


def test_a_run_within_its_reference_says_so_in_one_word(make_run, monkeypatch):
    page = report_page(read_beside(make_run(steps=1600), band(0.0, "validation_loss"), monkeypatch))
    assert "<dt>beside 3 recorded runs</dt><dd>within</dd>" in page
    assert (
        "Healthy runs lie in the light areas: night, 3 recorded runs, 2026-11-21. On a quiet machine." in page
    )
    assert "its reference" not in page


def test_a_run_that_is_off_says_where_and_what_differs(make_run, monkeypatch):
    page = report_page(read_beside(make_run(steps=1600), band(shift=-0.6), monkeypatch))
    assert "<li>Above its reference (night, 3 recorded runs): validation loss 3." in page
    assert "<li>Settings that differ: dropout is 0.0, and 0.1 in the reference</li>" in page
    assert "<dd>above</dd>" in page


def test_a_run_without_a_reference_says_nothing_of_one(make_run, monkeypatch):
    page = report_page(read_beside(make_run(steps=1600), None, monkeypatch))
    assert "its reference" not in page
    assert "light areas" not in page
    assert "<dt>beside" not in page


def test_the_light_areas_are_drawn_behind_the_curves(make_run, monkeypatch):
    run = make_run(steps=1600)
    without, beside = (plots.loss_charts(read_beside(run, each, monkeypatch)) for each in (None, band()))
    assert beside.count("<path") > without.count("<path")
    assert beside.count("opacity: 0.16") == 4  # two areas, wide and narrow
    assert without.count("opacity: 0.16") == 0


def test_areas_lie_where_the_run_had_seen_as_many_tokens(make_run, monkeypatch):
    grown = read_beside(make_run(steps=400), band(), monkeypatch)
    doubled = dataclasses.replace(  # the steps were half as large up to step 200
        grown,
        metrics=grown.metrics
        | {
            "tokens": np.where(grown.metrics["step"] <= 200, 0.5, 1.0)
            * TOKENS
            * np.where(grown.metrics["step"] <= 200, grown.metrics["step"], grown.metrics["step"] - 100)
        },
    )
    steps, low, high = plots.references(doubled)["validation_loss"]
    assert steps.tolist() == [200, 300, 500, 900, 1700]  # the last ones lie ahead of the run
    assert (high > low).all()
    middles, _, _ = plots.references(grown)["loss"]
    assert middles.tolist() == [50, 150, 300, 600, 1200]


def test_the_axis_shows_the_reference_of_a_run_that_is_far_off(make_run, monkeypatch):
    run = make_run(steps=1600)
    low, _ = plots.visible_loss([read_beside(run, band(shift=-1.5), monkeypatch)], "step")
    without, _ = plots.visible_loss([read_beside(run, None, monkeypatch)], "step")
    over_tokens, _ = plots.visible_loss([read_beside(run, band(shift=-1.5), monkeypatch)], "tokens")
    assert low < without - 1
    assert over_tokens == without
