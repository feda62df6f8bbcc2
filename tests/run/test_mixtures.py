"""Runs on several texts at once, and on text at a URL."""

from __future__ import annotations

import dataclasses

import pytest

from overnight.config import from_toml
from overnight.data import DataConfig, MixtureSource
from overnight.data.shards import read_manifest
from overnight.evaluation.compressors import measure_compression
from overnight.options import from_arguments
from overnight.planning.estimate import find_token_counts
from overnight.recipe import Recipe, with_settings
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory


@pytest.fixture(scope="session")
def second(prepared, prepare_texts, tmp_path_factory):
    """Another text, by the first one's tokenizer."""
    texts = [f"Number {number} of a text about a line.\n" * 6 for number in range(20)]
    own = {"tokenizer": f"{prepared}/tokenizer", "validation_fraction": 0.3}
    return prepare_texts(tmp_path_factory.mktemp("second"), texts, **own)


@pytest.fixture
def mixed(recipe, prepared, second):
    """The small recipe over both, 2 : 1."""
    return recipe(data=mix((prepared, 2), (second, 1)))


def mix(*sources: tuple[object, float]) -> DataConfig:
    return DataConfig(mixture=tuple(MixtureSource(path=str(path), weight=weight) for path, weight in sources))


def test_mixture_is_trained_evaluated_and_resumed_to_the_bit(mixed, second, prepared, train_to, fingerprint):
    whole = train_to(mixed, "whole")
    last = whole.read_events("evaluations")[-1]
    first, other = by_source = last["by_source"]
    assert [line["source"] for line in by_source] == [str(prepared), str(second)]
    assert [line["tokens"] for line in by_source] == [2 * last["tokens"] // 3, last["tokens"] // 3]
    assert first["evaluated_tokens"] + other["evaluated_tokens"] == last["evaluated_tokens"]
    nats = sum(line["loss"] * line["evaluated_tokens"] for line in by_source)
    assert last["loss"] == pytest.approx(nats / last["evaluated_tokens"], rel=1e-12)
    assert first["loss"] != other["loss"]
    assert all(line["epochs"] > 1 for line in by_source)
    assert fingerprint(train_to(mixed, "resumed", 5)) == fingerprint(whole)


def test_weights_of_a_mixture_change_the_run(mixed, recipe, second, prepared, train_to):
    """The negative control."""
    recipes = [mixed, recipe(data=mix((prepared, 1), (second, 2))), recipe()]
    runs = [train_to(with_settings(each, total_steps=4), str(at)) for at, each in enumerate(recipes)]
    assert len({run.read_metrics()[-1]["loss"] for run in runs}) == 3


def test_run_on_a_mixture_is_evaluated_and_planned(mixed, prepared, second, train_to, evaluate):
    directory = train_to(with_settings(mixed, total_steps=4), "run")
    recorded = directory.read_events("evaluations")[-1]["loss"]
    assert evaluate(directory.path)["loss"] == pytest.approx(recorded, rel=1e-9)
    manifests = [read_manifest(folder) for folder in (prepared, second)]
    train, validation = (sum(each.tokens(split) for each in manifests) for split in ("train", "validation"))
    text = find_token_counts(mixed.data, None)
    assert (text.tokens, text.validation_tokens) == (train + validation, validation)
    measured = measure_compression(directory)
    assert measured["bytes"] == sum(each.text_bytes("validation") for each in manifests)
    assert measured["training_bytes"] == sum(each.text_bytes("train") for each in manifests)


def test_mixture_in_toml_equals_the_option():
    words = ["--mixture", "data/a=0.7", "data/b=0.3"]
    expected = mix(("data/a", 0.7), ("data/b", 0.3))
    assert from_arguments(Recipe, words, prog="overnight train", about="").data == expected
    for name in ("mixture", "sources"):  # the second: the name of earlier versions
        text = f'[data]\n{name} = [{{path = "data/a", weight = 0.7}}, {{path = "data/b", weight = 0.3}}]'
        assert from_toml(Recipe, text, "recipe.toml").data == expected


def test_wrong_mixture_is_refused(recipe, prepared, prepare_texts, refusal, tmp_path):
    third = prepare_texts(tmp_path / "third", [f"Other characters: {n} €!\n" * 6 for n in range(20)])
    for data, named in (
        (dataclasses.replace(mix(("b", 1)), data="a"), "data=a and mixture"),
        (mix(("b", 0)), "weight 0 of b"),
        (mix(("b", float("nan"))), "weight nan of b"),
        (DataConfig(cache_bytes=0), "cache_bytes=0"),
        (mix((prepared, 1), (third, 1)), f"--tokenizer {prepared}/tokenizer"),
        (mix((prepared, 1), (f"{prepared}/", 1)), "sum of the"),
    ):
        message = refusal(recipe(data=data), tmp_path / "run")
        assert named in message


def test_text_at_a_url_trains_the_same_model(
    recipe, prepared, finished_run, fingerprint, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limit = 2 * max(path.stat().st_size for path in prepared.glob("*.bin"))
    data = DataConfig(data=f"file://{prepared}", cache_bytes=limit)
    remote = RunDirectory(tmp_path / "remote")
    used = train_recipe(recipe(data=data), remote).recipe.data
    assert (used.data, used.cache_bytes) == (data.data, limit)
    assert fingerprint(remote) == fingerprint(finished_run)
    cached = list((tmp_path / "cache").glob("overnight/shards/*/*.bin"))
    assert sum(path.stat().st_size for path in cached) <= limit
