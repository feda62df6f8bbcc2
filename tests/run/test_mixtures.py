"""Runs on several texts at once, and on text at a URL."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight.config import from_toml
from overnight.data import DataConfig, MixtureSource
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.options import from_arguments
from overnight.planning.estimate import find_token_counts
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory

Build = Callable[..., Recipe]
Fingerprint = Callable[[RunDirectory], Any]
Train = Callable[..., RunDirectory]


def prepare_text(root: Path, text: str, tokenizer: str) -> Path:
    """A folder of shards: 20 documents of one sentence, numbered."""
    root.mkdir()
    for number in range(20):
        (root / f"{number}.txt").write_text(text.format(number=number) * 6)
    folder = root / "shards"
    prepare_shards(
        PrepareConfig(source=str(root), out=str(folder), tokenizer=tokenizer, validation_fraction=0.3)
    )
    return folder


@pytest.fixture(scope="session")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, by the first one's tokenizer."""
    root = tmp_path_factory.mktemp("second") / "text"
    return prepare_text(root, "Number {number} of a text about a line.\n", f"{prepared}/tokenizer")


@pytest.fixture
def mixed(recipe: Build, prepared: Path, second: Path) -> Recipe:
    """The small recipe over both, 2 : 1."""
    return recipe(data=mix((prepared, 2), (second, 1)))


def mix(*sources: tuple[object, float]) -> DataConfig:
    return DataConfig(mixture=tuple(MixtureSource(path=str(path), weight=weight) for path, weight in sources))


def shortened(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, total_steps=4))


def test_mixture_is_trained_evaluated_and_resumed_to_the_bit(
    mixed: Recipe, second: Path, prepared: Path, train_to: Train, fingerprint: Fingerprint
) -> None:
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


def test_weights_of_a_mixture_change_the_run(
    mixed: Recipe, recipe: Build, second: Path, prepared: Path, train_to: Train
) -> None:
    """The negative control."""
    recipes = [mixed, recipe(data=mix((prepared, 1), (second, 2))), recipe()]
    runs = [train_to(shortened(each), str(number)) for number, each in enumerate(recipes)]
    assert len({run.read_metrics()[-1]["loss"] for run in runs}) == 3


def test_run_on_a_mixture_is_evaluated_and_planned(
    mixed: Recipe, prepared: Path, second: Path, train_to: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train_to(shortened(mixed), "run")
    capsys.readouterr()
    evaluation_command.run(EvaluateConfig(model=str(directory.path), device="cpu", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(directory.read_events("evaluations")[-1]["loss"], rel=1e-9)
    text = find_token_counts(mixed.data, None)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (prepared, second)]
    train_tokens, validation_tokens = (
        sum(shard["tokens"] for manifest in manifests for shard in manifest[split])
        for split in ("train", "validation")
    )
    assert (text.tokens, text.validation_tokens) == (train_tokens + validation_tokens, validation_tokens)


def test_mixture_in_toml_equals_the_option() -> None:
    words = ["--mixture", "data/a=0.7", "data/b=0.3"]
    expected = mix(("data/a", 0.7), ("data/b", 0.3))
    assert from_arguments(Recipe, words, prog="overnight train", about="").data == expected
    for name in ("mixture", "sources"):  # the second: the name of earlier versions
        text = f'[data]\n{name} = [{{path = "data/a", weight = 0.7}}, {{path = "data/b", weight = 0.3}}]'
        assert from_toml(Recipe, text, "recipe.toml").data == expected


def test_wrong_mixture_is_refused(recipe: Build, prepared: Path, tmp_path: Path) -> None:
    third = prepare_text(tmp_path / "third", "Other characters: {number} €!\n", "characters")
    for data, match in (
        (dataclasses.replace(mix(("b", 1)), data="a"), "data=a and mixture"),
        (mix(("b", 1), ("b", 1)), "b is twice in mixture"),
        (mix(("b", 0)), "weight 0 of b"),
        (mix(("b", float("nan"))), "weight nan of b"),
        (DataConfig(cache_bytes=0), "cache_bytes=0"),
        (mix((prepared, 1), (third, 1)), f"^{third} .*--tokenizer {prepared}/tokenizer"),
        (mix((prepared, 1), (f"{prepared}/", 1)), f"{prepared} .*sum of the"),
    ):
        with pytest.raises(ValueError, match=match):
            train_recipe(recipe(data=data), RunDirectory(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_text_at_a_url_trains_the_same_model(
    recipe: Build,
    prepared: Path,
    finished_run: RunDirectory,
    fingerprint: Fingerprint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limit = 2 * max(path.stat().st_size for path in prepared.glob("*.bin"))
    data = DataConfig(data=f"file://{prepared}", cache_bytes=limit)
    remote = RunDirectory(tmp_path / "remote")
    resolved = train_recipe(recipe(data=data), remote)
    assert fingerprint(remote) == fingerprint(finished_run)
    assert (resolved.recipe.data.data, resolved.recipe.data.cache_bytes) == (data.data, limit)
    cached = list((tmp_path / "cache").glob("overnight/shards/*/*.bin"))
    assert sum(path.stat().st_size for path in cached) <= limit
