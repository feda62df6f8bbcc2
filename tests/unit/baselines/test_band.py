import math
import re

import pytest

from overnight.baselines.band import BandCurve, BandPoint, ReferenceBand, find_band, load_bands, read_band
from overnight.baselines.diagnoses import Deviation
from overnight.recipe import flatten, load_recipe

BAND = ReferenceBand(
    recipe="small",
    source="3 runs",
    date="2026-11-21",
    identity={"n_layer": 2, "init_from": None},
    settings={"dropout": 0.0, "decay_steps": None},
    text={"source": ("a", "b"), "tokenizer": ("characters",)},
    unigram_nats=3.0,
    curves={"loss": BandCurve(tokens=(0, 100, 1000), low=(9, 4, 2), middle=(10, 5, 3), high=(12, 6, 4))},
)
SETTINGS = {"n_layer": 2, "dropout": 0.0, "peak_learning_rate": 1.0}
TEXT_FACTS = {"source": "b", "tokenizer": "characters", "documents": 3}


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"n_layer": 3}, {}),
        ({"init_from": "gpt2"}, {}),
        ({"positions": "rotary"}, {}),
        ({"optimizer": "muon"}, {}),
        ({}, {"source": "c"}),
        ({}, {"tokenizer": "gpt2"}),
    ],
)
def test_band_fits_only_its_recipe_on_its_text(settings, text):
    assert find_band(SETTINGS, TEXT_FACTS, [BAND]) is BAND
    assert find_band(SETTINGS | settings, TEXT_FACTS | text, [BAND]) is None
    assert find_band(SETTINGS, {}, [BAND]) is None


def test_band_is_read_as_it_was_written():
    assert read_band(BAND.to_json()) == BAND


def test_differences_have_both_values():
    assert BAND.differences(SETTINGS) == {}
    differences = BAND.differences(SETTINGS | {"dropout": 0.1, "decay_steps": 7})
    assert [*differences] == ["dropout", "decay_steps"]
    assert re.search("0.1.* 0.0", differences["dropout"])


def test_curve_is_linear_over_the_logarithm_of_tokens():
    curve = BAND.curves["loss"]
    # The fall from the start is not interpolated.
    assert [curve.at(tokens) for tokens in (0, 50, 100, 1001)] == [(9, 10, 12), None, (4, 5, 6), None]
    assert curve.at(round(100 * math.sqrt(10))) == pytest.approx((3, 4, 5), rel=1e-3)


def test_z_is_one_at_the_edges():
    band = BandPoint(9, 10, 12)
    values = (8, 9, 10, 11, 12, 14, math.nan, math.inf)
    assert [Deviation(100, value, band).z for value in values] == [-2, -1, 0, 0.5, 1, 2, math.inf, math.inf]
    assert Deviation(100, 1.5, BandPoint(1, 1, 1)).z == math.inf


def test_bands_of_the_package_belong_to_its_recipes(programs):
    recorded = programs["bands"]
    assert load_bands()
    for band in load_bands():
        assert len(band.to_json()) < 40_000
        settings = flatten(load_recipe(band.recipe.split()[0]))
        assert band.identity.keys() <= settings.keys()
        for name, value in {**band.identity, **band.settings}.items():
            if name != "vocab_size" and settings.get(name) is not None:
                assert settings[name] == value, (band.recipe, name)
        assert set(band.text) | {"tokenizer_fingerprint"} == set(recorded.TEXT)
        assert set(band.curves) <= set(recorded.MIN_HALF_WIDTH)
        for curve in band.curves.values():
            assert list(curve.tokens) == sorted({*curve.tokens})
            for edges in zip(curve.low, curve.middle, curve.high, strict=True):
                assert list(edges) == sorted(edges)


def test_published_curve_is_for_its_text_only():
    settings = flatten(load_recipe("gpt2-124m")) | {"vocab_size": 50257}
    (band,) = (band for band in load_bands() if "FineWeb" in band.recipe)
    facts = {name: known[0] for name, known in band.text.items()}
    assert find_band(settings, facts) is band
    assert find_band(settings, facts | {"source": "fineweb-edu"}) is None
    assert band.curves["validation_loss"].at(10_000 * 524_288) == BandPoint(3.342, 3.392, 3.472)
    assert band.differences(settings) == {}
    assert "chosen, not measured" in band.notes
