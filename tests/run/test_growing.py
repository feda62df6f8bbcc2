"""A run that begins while its text is still being prepared is the run that waited for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overnight.data import DataConfig, MixtureSource
from overnight.data.atomic_folder import staging_path
from overnight.data.shards import read_manifest
from overnight.preparation.prepare import prepare_shards
from overnight.recipe import read_recipe_of
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory


@pytest.fixture
def config(config_of_waves):
    """A text of several waves: some 20,000 training tokens."""
    return config_of_waves(lambda n: f"Document {n}: " + "word " * (n % 30 % 17))


@pytest.fixture
def early(recipe, config):
    """A recipe over it whose 12 steps need more than the first wave."""
    batch = {"tokens_per_step": 32 * 32, "micro_batch_size": 16}
    return recipe(data=DataConfig(data=config.out, shuffle_window=2000), evaluation_tokens=500, **batch)


@pytest.fixture
def interrupted(config, after_each_wave):
    """A preparation that was interrupted when it had published its first shards."""

    def interrupt():
        raise KeyboardInterrupt

    after_each_wave(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(config)
    after_each_wave(lambda: None)


@pytest.fixture
def begun(early, interrupted, tmp_path):
    """A run that has used up what the interrupted preparation has published."""
    directory = RunDirectory(tmp_path / "early")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(early, directory)
    assert 0 < len(directory.read_metrics()) < 12
    return directory


def test_run_stops_at_the_end_of_the_text_and_resumes(begun, early, config, resume, train_to, fingerprint):
    assert json.loads(begun.data.read_text())["is_complete"] is False
    prepare_shards(config)
    resume(begun)
    patient = train_to(early, "patient")
    assert fingerprint(begun) == fingerprint(patient)
    assert json.loads(begun.data.read_text()) == json.loads(patient.data.read_text())


def test_run_waits_for_a_preparation_at_work(early, config, after_each_wave, train_to, fingerprint, capsys):
    """Two at once: one prepares, slowly, and the other trains on what is there."""
    published = threading.Event()
    after_each_wave(lambda: (published.set(), time.sleep(1.5)))
    with ThreadPoolExecutor(1) as threads:
        preparation = threads.submit(prepare_shards, config)
        assert published.wait(60)
        directory = train_to(early, "early")
        preparation.result()
    assert "waiting for the preparation" in capsys.readouterr().err
    assert fingerprint(directory) == fingerprint(train_to(early, "patient"))
    recorded = json.loads(directory.data.read_text())["train"]
    shards = [dataclasses.asdict(shard) for shard in read_manifest(Path(config.out)).train]
    assert recorded == shards[: len(recorded)] != []


def test_resuming_on_other_text_is_refused(begun, config, refusal):
    changed = Path(config.source) / "00.jsonl"
    changed.write_text(changed.read_text().replace("Document 1:", "Document one:"))
    with pytest.raises(ValueError, match="was edited since"):
        prepare_shards(config)
    shutil.rmtree(staging_path(Path(config.out)))
    prepare_shards(config)
    assert "is not the data that" in refusal(read_recipe_of(begun.path), begun.path, resume=True)


@pytest.mark.parametrize(
    "section, changes, named",
    [
        ("data", {"shuffle_window": None}, "--shuffle-window"),
        ("data", {"packing": "best-fit"}, "packing=best-fit"),
        ("data", {"shuffle_window": 0}, "shuffle_window=0"),
        ("data", {"data": "", "mixture": ("", "/")}, "mixture must be complete"),
        ("evaluation", {"evaluation_tokens": None}, "--evaluation-tokens"),
        ("evaluation", {"evaluation_tokens": 10**6}, "--evaluation-tokens"),
    ],
)
@pytest.mark.usefixtures("interrupted")
def test_settings_that_need_the_whole_text_are_refused(early, refusal, tmp_path, section, changes, named):
    if ends := changes.get("mixture"):
        sources = tuple(MixtureSource(path=early.data.data + end, weight=1) for end in ends)
        changes = {**changes, "mixture": sources}
    changed = dataclasses.replace(getattr(early, section), **changes)
    assert named in refusal(dataclasses.replace(early, **{section: changed}), tmp_path / "run")
