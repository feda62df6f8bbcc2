"""A run that begins while its text is still being prepared is the run that waited for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.data.shards import read_manifest
from overnight.preparation import prepare as prepare_module
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import EvaluationConfig, Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig

Build = Callable[..., Recipe]
WORK = """
import sys, time
from overnight.preparation import prepare as module
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
module.UNIT_BYTES, module.EARLY_BYTES = 2000, 12_000
show = module.show_so_far
def slowly(place):
    show(place)
    time.sleep(1.5)
module.show_so_far = slowly
prepare(PrepareConfig(source=sys.argv[1], out=sys.argv[2], tokenizer="characters",
                      validation_fraction=0.2, shard_tokens=1500, workers=1))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """A text of several waves: some 20,000 training tokens."""
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(20):
        lines = [f"Document {number * 30 + k}: " + "word " * (k % 17) for k in range(30)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (source / f"{number:02}.jsonl").write_text(text)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "EARLY_BYTES", 12_000)
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "shards"),
        tokenizer="characters",
        validation_fraction=0.2,
        shard_tokens=1500,
        workers=1,
    )


@pytest.fixture
def early(recipe: Build, config: PrepareConfig) -> Recipe:
    """A recipe over it whose 12 steps need more than the first wave."""
    return recipe(
        data=DataConfig(data=config.out or "", shuffle_window=2000),
        batch=BatchConfig(tokens_per_step=32 * 32, micro_batch_size=16),
        evaluation=EvaluationConfig(evaluate_every_steps=4, evaluation_tokens=500),
    )


def interrupt(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare until the first shards are shown, and no further."""

    def show(place: Path) -> None:
        real(place)
        raise KeyboardInterrupt

    real = prepare_module.show_so_far
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "show_so_far", show)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)


def outcome(directory: RunDirectory) -> tuple[str, list[float], list[dict[str, object]], object]:
    """Hash of the weights, every loss, every evaluation, and what the run says of its text."""
    newest = max(directory.checkpoints.iterdir())
    digest = hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()
    losses = [line["loss"] for line in directory.read_metrics()]
    return digest, losses, directory.read_events("evaluations"), json.loads(directory.data.read_text())


@pytest.fixture
def begun(
    early: Recipe, config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunDirectory:
    """A run that has come to the end of what an interrupted preparation has shown."""
    interrupt(config, monkeypatch)
    directory = RunDirectory(tmp_path / "early")
    with pytest.raises(KeyboardInterrupt):
        train.run(early, directory)
    assert 0 < len(directory.read_metrics()) < 12
    return directory


def go_on(directory: RunDirectory) -> None:
    again = train.from_toml(Recipe, directory.recipe.read_text(), "recipe.toml")
    train.run(again, directory, resume=True)


def test_a_run_goes_as_far_as_the_text_and_on_when_there_is_more(
    begun: RunDirectory, early: Recipe, config: PrepareConfig, tmp_path: Path
) -> None:
    directory = begun
    assert json.loads(directory.data.read_text())["is_complete"] is False
    prepare(config)
    go_on(directory)
    patient = RunDirectory(tmp_path / "patient")
    train.run(early, patient)
    assert outcome(directory) == outcome(patient)


def test_a_run_waits_for_a_preparation_at_work(
    early: Recipe, config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes at once: one prepares, slowly, and the other trains on what is there."""
    assert config.source is not None
    assert config.out is not None
    place = Path(config.out).with_name(".shards.partial")
    with subprocess.Popen([sys.executable, "-c", WORK, config.source, config.out]) as work:
        while not (place / "so-far.json").exists():
            assert work.poll() is None
            time.sleep(0.02)
        directory = RunDirectory(tmp_path / "early")
        train.run(early, directory)
        assert work.wait() == 0
    assert "waiting for the preparation of" in capsys.readouterr().err
    patient = RunDirectory(tmp_path / "patient")
    train.run(early, patient)
    assert outcome(directory)[:3] == outcome(patient)[:3]
    recorded = json.loads(directory.data.read_text())["train"]
    shards = [dataclasses.asdict(shard) for shard in read_manifest(Path(config.out)).train]
    assert 0 < len(recorded) <= len(shards)
    assert recorded == shards[: len(recorded)]


def test_another_text_is_refused_on_going_on(begun: RunDirectory, config: PrepareConfig) -> None:
    changed = Path(config.source or "") / "00.jsonl"
    changed.write_text(changed.read_text().replace("Document 1:", "Document one:"))
    prepare(config)
    with pytest.raises(ValueError, match="is not what .* was trained on"):
        go_on(begun)


def refusal(recipe: Recipe, tmp_path: Path) -> str:
    with pytest.raises(ValueError, match=".") as error:
        train.run(recipe, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run" / "recipe.toml").exists()
    return str(error.value)


def test_what_needs_the_whole_text_is_refused(
    early: Recipe, config: PrepareConfig, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(config, monkeypatch)
    shards = early.data.data

    def with_data(**changes: object) -> Recipe:
        return dataclasses.replace(early, data=dataclasses.replace(early.data, **changes))

    assert "is not prepared to its end: wait" in refusal(with_data(shuffle_window=None), tmp_path)
    assert "does not go with packing=best-fit" in refusal(with_data(packing="best-fit"), tmp_path)
    assert "shuffle_window=0 must be at least 1" in refusal(with_data(shuffle_window=0), tmp_path)
    mixed = with_data(
        data="",
        mixture=(MixtureSource(path=shards, weight=1.0), MixtureSource(path=shards + "/", weight=1.0)),
    )
    assert "is still being prepared, and the texts of a mixture must be complete" in refusal(mixed, tmp_path)
    for tokens in (None, 10**6):
        judged = dataclasses.replace(early, evaluation=EvaluationConfig(evaluation_tokens=tokens))
        assert "give --evaluation-tokens" in refusal(judged, tmp_path)
