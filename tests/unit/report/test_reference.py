"""A run's reference band on its page."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from overnight.baselines.band import BandCurve, ReferenceBand
from overnight.report import plots, run_data
from overnight.report.page import report_page
from overnight.report.run_data import RunData, read_run

TOKENS = 524_288


def band(shift: float = 0.0, *names: str) -> ReferenceBand:
    """About where the run of `make_run` lies, or `shift` nats higher."""
    steps = (100, 200, 400, 800, 1600)
    losses = [3.05 + 2.6 / (1 + step / 60) ** 0.5 + shift for step in steps]
    curve = BandCurve(
        tokens=tuple(TOKENS * step for step in steps),
        low=tuple(loss - 0.3 for loss in losses),
        middle=tuple(losses),
        high=tuple(loss + 0.3 for loss in losses),
    )
    return ReferenceBand(
        recipe="night",
        source="3 recorded runs",
        date="2026-11-21",
        notes="In fp32.",
        identity={},
        settings={"dropout": 0.1},
        text={},
        unigram_nats=None,
        curves=dict.fromkeys(names or ("loss", "validation_loss"), curve),
    )


@pytest.fixture
def read(make_run, monkeypatch) -> Callable[..., RunData]:
    """read(band, steps=...) -> the run, compared with that band."""

    def build(reference: ReferenceBand | None, steps: int = 1600) -> RunData:
        monkeypatch.setattr(run_data, "find_band", lambda settings, text: reference)
        return read_run(make_run(f"run-{next(numbers)}", steps=steps))

    numbers = itertools.count()
    return build


def test_run_within_its_reference(read):
    page = report_page(read(band(0.0, "validation_loss")))
    assert "3 recorded runs</dt><dd>within</dd>" in page
    assert "night, 3 recorded runs, 2026-11-21. In fp32." in page
    assert 'class="notice"' not in page


def test_run_off_its_reference_shows_position_and_differences(read):
    off, without = read(band(shift=-1.5)), read(None)
    page = report_page(off)
    assert "<li>Above its reference (night, 3 recorded runs): validation loss 3." in page
    assert "dropout is 0.0, and 0.1 in the reference</li>" in page
    assert "<dd>above</dd>" in page
    assert page.count("opacity: 0.16") == 2, "two bands are drawn"
    low, _ = plots.visible_loss([without], "step")
    assert plots.visible_loss([off], "step")[0] < low - 1
    assert plots.visible_loss([off], "tokens") == plots.visible_loss([without], "step")
    page = report_page(without)
    for words in ("its reference", "3 recorded runs", "light areas", "opacity: 0.16"):
        assert words not in page


def test_bands_lie_at_the_steps_with_the_same_tokens(read):
    run = read(band(), steps=400)
    step = run.metrics["step"]
    tokens = TOKENS * np.where(step <= 200, 0.5 * step, step - 100)  # half as large up to step 200
    grown = dataclasses.replace(run, metrics=run.metrics | {"tokens": tokens})
    steps, low, high = plots.reference_bands(grown)["validation_loss"]
    assert steps.tolist() == [200, 300, 500, 900, 1700]  # the last ones lie ahead of the run
    assert (high > low).all()
    middles, _, _ = plots.reference_bands(run)["loss"]
    assert middles.tolist() == [50, 150, 300, 600, 1200]
