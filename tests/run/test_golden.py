"""The losses of small recipes, and of a run of an earlier version that is resumed, stay what they were.

A commit that changes the curves says why, and records them again with tools/golden.py --write. The earlier
version's run, golden/old-run, is never recorded again: version 0.1 prepared its shards, began it, and was
killed after step 8, two steps after a checkpoint; expected.json has what it recorded without interruption.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from overnight.run.resume import load_resumed
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig

ELSEWHERE = 1e-5  # relative, on another processor or torch
OLD_RUN = Path(__file__).with_name("golden") / "old-run"


@pytest.fixture
def golden(programs):
    """tools/golden.py."""
    return programs["golden"]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def check(golden: Any, recorded: dict[str, Any], name: str, found: list[float]) -> None:
    """Equal to the bit on a machine of the same class, elsewhere within rounding."""
    if all(recorded[fact] == value for fact, value in golden.describe_class().items()):
        assert found == recorded[name]
    assert found == pytest.approx(recorded[name], rel=ELSEWHERE)


@pytest.mark.parametrize("name", ["plain", "micro-batches", "wsd-chunked"])
def test_losses_are_the_recorded_ones(golden, tmp_path, name):
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == {*golden.RECIPES}
    losses = golden.train(name, tmp_path)
    check(golden, read(golden.FOLDER / f"{name}.json"), "losses", losses)
    assert losses[-1] < 0.8 * losses[0], "it learns"


def test_comparison_detects_a_slightly_different_learning_rate(golden, tmp_path, monkeypatch):
    """The negative control: it differs in its fourth place."""
    optimizer = OptimizerConfig(peak_learning_rate=1.0001e-2)
    monkeypatch.setitem(golden.RECIPES, "plain", {**golden.RECIPES["plain"], "optimizer": optimizer})
    recorded = read(golden.FOLDER / "plain.json")["losses"]
    losses = golden.train("plain", tmp_path)
    assert losses != pytest.approx(recorded, rel=ELSEWHERE)
    assert losses[0] == pytest.approx(recorded[0], rel=ELSEWHERE)


def test_run_of_an_earlier_version_is_resumed(golden, tmp_path, monkeypatch):
    """Old names of settings and values, in its recipe and its checkpoint, included."""
    shutil.copytree(OLD_RUN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    recipe, directory = load_resumed(Path("run")), RunDirectory("run")
    recorded = read(OLD_RUN / "expected.json")
    assert (recipe.compute.loss, recipe.compute.attention) == ("chunked", "math")
    assert (recipe.batch.batch_ramp_tokens, recipe.guard.spike_sigma) == (640, 6.0)
    assert not recipe.checkpoints.async_checkpoint
    train_recipe(recipe, directory, resume=True)
    lines = directory.read_metrics()
    check(golden, recorded, "losses", [line["loss"] for line in lines])
    check(golden, recorded, "grad_norms", [line["grad_norm"] for line in lines])
    check(golden, recorded, "validation_loss", directory.read_events("evaluations")[-1]["loss"])
    assert read(directory.checkpoints / "step-00000012" / "state.json")["updates"] == 12


def test_shards_of_an_earlier_version_are_prepared_alike(prepare_texts, tmp_path):
    texts = [
        "".join(f"Line {line} is about {(line * 7 + number) % 100}.\n" for line in range(12))
        for number in range(12)
    ]
    shards = prepare_texts(tmp_path / "text", texts)
    old, new = read(OLD_RUN / "shards" / "manifest.json"), read(shards / "manifest.json")
    names = ("split_rule", "tokenizer_fingerprint", "documents", "train", "validation")
    assert {name: new[name] for name in names} == {name: old[name] for name in names}
    for path in (OLD_RUN / "shards").glob("*.bin"):
        assert (shards / path.name).read_bytes() == path.read_bytes()
