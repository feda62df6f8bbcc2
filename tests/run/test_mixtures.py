"""Runs on several texts at once, and on text that lies elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overnight.config import from_arguments, from_toml
from overnight.data import DataConfig, MixtureSource
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.planning.estimate import find_token_counts
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory

Build = Callable[..., Recipe]


def prepare_more(root: Path, text: str, tokenizer: str) -> Path:
    """Another folder of shards: 20 documents of one sentence, numbered."""
    root.mkdir()
    for number in range(20):
        (root / f"{number}.txt").write_text(text.format(number=number) * 6)
    folder = root / "shards"
    prepare(PrepareConfig(source=str(root), out=str(folder), tokenizer=tokenizer, validation_fraction=0.3))
    return folder


@pytest.fixture(scope="session")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, by the first one's tokenizer."""
    root = tmp_path_factory.mktemp("second") / "text"
    return prepare_more(root, "Number {number} of a text about a line.\n", f"{prepared}/tokenizer")


@pytest.fixture
def mixed(recipe: Build, prepared: Path, second: Path) -> Recipe:
    """The small recipe over both, 2 : 1."""
    sources = (MixtureSource(path=str(prepared), weight=2), MixtureSource(path=str(second), weight=1))
    return recipe(data=DataConfig(mixture=sources))


def fingerprint(directory: RunDirectory) -> tuple[str, list[object], list[object]]:
    weights = (directory.checkpoints / "step-00000012" / "model.safetensors").read_bytes()
    losses = [line["loss"] for line in directory.read_metrics()]
    return hashlib.sha256(weights).hexdigest(), losses, directory.read_events("evaluations")


def test_a_mixture_is_trained_judged_and_resumed_to_the_bit(
    mixed: Recipe, second: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunDirectory(tmp_path / "full")
    train_module.run(mixed, whole)
    last = whole.read_events("evaluations")[-1]
    by_source = last["by_source"]
    assert [line["source"] for line in by_source] == [str(prepared), str(second)]
    assert [line["tokens"] for line in by_source] == [2 * last["tokens"] // 3, last["tokens"] // 3]
    judged = [line["evaluated_tokens"] for line in by_source]
    assert sum(judged) == last["evaluated_tokens"]
    pooled = sum(line["loss"] * count for line, count in zip(by_source, judged, strict=True)) / sum(judged)
    assert last["loss"] == pytest.approx(pooled, rel=1e-12)
    assert by_source[0]["loss"] != by_source[1]["loss"]
    assert all(line["epochs"] > 1 for line in by_source)

    parted = RunDirectory(tmp_path / "parted")

    @contextmanager
    def stop_soon() -> Iterator[Callable[[], bool]]:
        answers = iter([False] * 5)
        yield lambda: next(answers, True)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "stop_on_signal", stop_soon)
        with pytest.raises(KeyboardInterrupt):
            train_module.run(mixed, parted)
    reread = from_toml(Recipe, parted.recipe.read_text(), "recipe.toml")
    assert not reread.problems()
    train_module.run(reread, parted, resume=True)
    assert fingerprint(parted) == fingerprint(whole)


def test_a_mixture_is_not_any_of_its_sources(mixed: Recipe, recipe: Build, tmp_path: Path) -> None:
    """The negative control: other weights are another run."""
    sources = tuple(
        dataclasses.replace(source, weight=weight)
        for source, weight in zip(mixed.data.mixture, (1, 2), strict=True)
    )
    other = dataclasses.replace(mixed, data=DataConfig(mixture=sources))
    losses = []
    for number, each in enumerate((mixed, other, recipe())):
        short = dataclasses.replace(each, schedule=dataclasses.replace(each.schedule, total_steps=4))
        directory = RunDirectory(tmp_path / str(number))
        train_module.run(short, directory)
        losses.append(directory.read_metrics()[-1]["loss"])
    assert len(set(losses)) == 3


def test_a_run_on_a_mixture_can_be_judged_and_planned(
    mixed: Recipe, prepared: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "run")
    short = dataclasses.replace(mixed, schedule=dataclasses.replace(mixed.schedule, total_steps=4))
    train_module.run(short, directory)
    capsys.readouterr()
    evaluation_command.run(EvaluateConfig(model=str(directory.path), device="cpu", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(directory.read_events("evaluations")[-1]["loss"], rel=1e-9)
    text = find_token_counts(mixed.data, None)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (prepared, second)]
    train, validation = (
        sum(shard["tokens"] for manifest in manifests for shard in manifest[split])
        for split in ("train", "validation")
    )
    assert (text.tokens, text.validation_tokens) == (train + validation, validation)
    assert text.folder == f"{prepared}, {second}"


def test_the_same_mixture_in_toml_and_on_the_command_line() -> None:
    text = '[data]\nsources = [{path = "data/a", weight = 0.7}, {path = "data/b", weight = 0.3}]'
    words = ["--mixture", "data/a=0.7", "data/b=0.3"]
    read = from_toml(Recipe, text, "recipe.toml")
    assert from_arguments(Recipe, words, prog="overnight train", about="").data == read.data
    assert read.data.mixture == (
        MixtureSource(path="data/a", weight=0.7),
        MixtureSource(path="data/b", weight=0.3),
    )


def refusal(recipe: Recipe, folder: Path) -> str:
    with pytest.raises(ValueError, match=".") as error:
        train_module.run(recipe, RunDirectory(folder))
    assert not folder.exists()
    return str(error.value)


def test_sources_of_different_tokenizers_are_refused_by_name(
    recipe: Build, prepared: Path, tmp_path: Path
) -> None:
    third = prepare_more(tmp_path / "third", "Other characters: {number} €!\n", "characters")
    sources = (MixtureSource(path=str(prepared), weight=1), MixtureSource(path=str(third), weight=1))
    told = refusal(recipe(data=DataConfig(mixture=sources)), tmp_path / "run")
    assert told.startswith(f"{third} is written with the tokenizer characters and {prepared} with another")
    assert told.endswith(f"prepare {third} again with --tokenizer {prepared}/tokenizer")


@pytest.mark.parametrize(
    "data, sentence",
    [
        (
            DataConfig(data="a", mixture=(MixtureSource(path="b", weight=1),)),
            "give only one of data=a and sources",
        ),
        (DataConfig(mixture=(MixtureSource(path="b", weight=1),) * 2), "b stands twice in sources"),
        (
            DataConfig(mixture=(MixtureSource(path="b", weight=0),)),
            "the weight 0 of b must be a finite number above 0",
        ),
        (DataConfig(mixture=(MixtureSource(path="b", weight=float("nan")),)), "the weight nan of b must be"),
        (DataConfig(cache_bytes=0), "cache_bytes=0 must be at least 1"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(
    recipe: Build, tmp_path: Path, data: DataConfig, sentence: str
) -> None:
    assert sentence in refusal(recipe(data=data), tmp_path / "run")


def test_two_names_of_one_folder_are_refused(recipe: Build, prepared: Path, tmp_path: Path) -> None:
    sources = (MixtureSource(path=str(prepared), weight=1), MixtureSource(path=f"{prepared}/", weight=1))
    told = refusal(recipe(data=DataConfig(mixture=sources)), tmp_path / "run")
    assert told == f"two of the sources are {prepared}: give it once, with the sum of their weights"


def test_text_elsewhere_trains_the_same_model(
    recipe: Build, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, elsewhere = RunDirectory(tmp_path / "here"), RunDirectory(tmp_path / "elsewhere")
    train_module.run(recipe(), here)
    largest = max(path.stat().st_size for path in prepared.glob("*.bin"))
    resolved = train_module.run(
        recipe(data=DataConfig(data=f"file://{prepared}", cache_bytes=2 * largest)), elsewhere
    )
    assert fingerprint(elsewhere) == fingerprint(here)
    assert resolved.data.data == f"file://{prepared}"
    assert resolved.data.cache_bytes == 2 * largest
    kept = list((tmp_path / "cache").glob("overnight/shards/*/*.bin"))
    assert sum(path.stat().st_size for path in kept) <= 2 * largest
