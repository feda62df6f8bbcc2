"""A run that begins while its text is still being prepared is the run that waited for it."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.data.shards import read_manifest
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import EvaluationConfig, Recipe, read_recipe_of
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig

Build = Callable[..., Recipe]
AfterEachWave = Callable[[Callable[[], object]], None]
Fingerprint = Callable[[RunDirectory], Any]


@pytest.fixture
def config(config_of_waves: Callable[..., PrepareConfig]) -> PrepareConfig:
    """A text of several waves: some 20,000 training tokens."""
    return config_of_waves(lambda n: f"Document {n}: " + "word " * (n % 30 % 17))


@pytest.fixture
def early(recipe: Build, config: PrepareConfig) -> Recipe:
    """A recipe over it whose 12 steps need more than the first wave."""
    return recipe(
        data=DataConfig(data=config.out or "", shuffle_window=2000),
        batch=BatchConfig(tokens_per_step=32 * 32, micro_batch_size=16),
        evaluation=EvaluationConfig(evaluate_every_steps=4, evaluation_tokens=500),
    )


@pytest.fixture
def interrupted(config: PrepareConfig, after_each_wave: AfterEachWave) -> None:
    """A preparation that was interrupted when it had published its first shards."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    after_each_wave(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(config)
    after_each_wave(lambda: None)


@pytest.fixture
def begun(early: Recipe, interrupted: None, tmp_path: Path) -> RunDirectory:
    """A run that has used up what the interrupted preparation has published."""
    directory = RunDirectory(tmp_path / "early")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(early, directory)
    assert 0 < len(directory.read_metrics()) < 12
    return directory


def test_run_stops_at_the_end_of_the_text_and_resumes_when_there_is_more(
    begun: RunDirectory, early: Recipe, config: PrepareConfig, tmp_path: Path, fingerprint: Fingerprint
) -> None:
    assert json.loads(begun.data.read_text())["is_complete"] is False
    prepare_shards(config)
    train_recipe(read_recipe_of(begun.path), begun, resume=True)
    patient = RunDirectory(tmp_path / "patient")
    train_recipe(early, patient)
    assert fingerprint(begun) == fingerprint(patient)
    assert json.loads(begun.data.read_text()) == json.loads(patient.data.read_text())


def test_run_waits_for_a_preparation_at_work(
    early: Recipe,
    config: PrepareConfig,
    tmp_path: Path,
    fingerprint: Fingerprint,
    after_each_wave: AfterEachWave,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two at once: one prepares, slowly, and the other trains on what is there."""
    published = threading.Event()
    after_each_wave(lambda: (published.set(), time.sleep(1.5)))
    with ThreadPoolExecutor(1) as threads:
        preparation = threads.submit(prepare_shards, config)
        assert published.wait(60)
        directory = RunDirectory(tmp_path / "early")
        train_recipe(early, directory)
        preparation.result()
    assert "waiting for the preparation" in capsys.readouterr().err
    patient = RunDirectory(tmp_path / "patient")
    train_recipe(early, patient)
    assert fingerprint(directory) == fingerprint(patient)
    recorded = json.loads(directory.data.read_text())["train"]
    shards = [dataclasses.asdict(shard) for shard in read_manifest(Path(config.out or "")).train]
    assert recorded == shards[: len(recorded)] != []


def test_resuming_on_other_text_is_refused(begun: RunDirectory, config: PrepareConfig) -> None:
    changed = Path(config.source or "") / "00.jsonl"
    changed.write_text(changed.read_text().replace("Document 1:", "Document one:"))
    prepare_shards(config)
    with pytest.raises(ValueError, match="is not the data that"):
        train_recipe(read_recipe_of(begun.path), begun, resume=True)


@pytest.mark.usefixtures("interrupted")
def test_settings_that_need_the_whole_text_are_refused(early: Recipe, tmp_path: Path) -> None:
    sources = tuple(MixtureSource(path=early.data.data + end, weight=1) for end in ("", "/"))
    for name, changes, match in (
        ("data", {"shuffle_window": None}, "--shuffle-window"),
        ("data", {"packing": "best-fit"}, "packing=best-fit"),
        ("data", {"shuffle_window": 0}, "shuffle_window=0"),
        ("data", {"data": "", "mixture": sources}, "mixture must be complete"),
        ("evaluation", {"evaluation_tokens": None}, "--evaluation-tokens"),
        ("evaluation", {"evaluation_tokens": 10**6}, "--evaluation-tokens"),
    ):
        section = dataclasses.replace(getattr(early, name), **changes)
        with pytest.raises(ValueError, match=match):
            train_recipe(dataclasses.replace(early, **{name: section}), RunDirectory(tmp_path / "run"))
        assert not (tmp_path / "run" / "recipe.toml").exists()
