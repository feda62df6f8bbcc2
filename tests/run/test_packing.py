"""Runs whose rows are packed in each of the three ways."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight.cli import main
from overnight.conversion.open_model import open_model
from overnight.data import MixtureSource
from overnight.data.dataset import open_one_dataset
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.evaluation.perplexity import evaluate_language_model
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, flatten, incompatible_settings
from overnight.run_directory import RunDirectory
from overnight.training.schedule import ScheduleConfig

PACKINGS = ("stream", "documents", "best-fit")

Build = Callable[..., Recipe]
Fingerprint = Callable[[RunDirectory], Any]
Train = Callable[..., RunDirectory]


def packed(recipe: Build, packing: str, dropout: float = 0.0) -> Recipe:
    """Four steps with that packing, some two epochs."""
    data = dataclasses.replace(recipe().data, packing=packing)  # type: ignore[arg-type]
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=dropout)
    return recipe(data=data, model=model, schedule=ScheduleConfig(total_steps=4, warmup_steps=1))


def choices_of(run: RunDirectory) -> dict[str, str]:
    choices: dict[str, str] = json.loads(run.environment.read_text())["choices"]
    return choices


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_run_is_resumed_to_the_bit(
    recipe: Build, train_to: Train, fingerprint: Fingerprint, packing: str, dropout: float
) -> None:
    small = packed(recipe, packing, dropout)
    assert fingerprint(train_to(small, "resumed", 2)) == fingerprint(train_to(small, "whole"))


def test_each_packing_trains_on_other_rows(recipe: Build, train_to: Train) -> None:
    """The comparison above detects a difference, and a run records how its rows are packed."""
    runs = {name: train_to(packed(recipe, name), name) for name in PACKINGS}
    losses = [tuple(line["loss"] for line in run.read_metrics()) for run in runs.values()]
    assert len(set(losses)) == 3
    assert "one document after the other" in choices_of(runs["documents"])["attention"]
    assert "cut off in an epoch" in choices_of(runs["best-fit"])["packing"]
    assert "packing" not in choices_of(runs["stream"])
    for name, run in runs.items():
        assert f'packing = "{name}"' in run.recipe.read_text()


def test_each_source_of_a_mixture_is_packed(
    recipe: Build, prepared: Path, tmp_path: Path, train_to: Train, fingerprint: Fingerprint
) -> None:
    other = shutil.copytree(prepared, tmp_path / "other")
    small = packed(recipe, "best-fit")
    sources = (MixtureSource(path=str(prepared), weight=2), MixtureSource(path=str(other), weight=1))
    mixed = dataclasses.replace(small, data=dataclasses.replace(small.data, data="", mixture=sources))
    whole = train_to(mixed, "whole")
    choice = choices_of(whole)["packing"]
    assert choice.count("cut off in an epoch") == 2
    assert f"{other}: " in choice
    assert fingerprint(train_to(mixed, "resumed", 2)) == fingerprint(whole)


def test_run_within_documents_is_evaluated_within_documents(
    recipe: Build, train_to: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    small = packed(recipe, "documents")
    directory = train_to(small, "run")
    recorded = directory.read_events("evaluations")[-1]["loss"]
    capsys.readouterr()
    evaluation_command.run(EvaluateConfig(model=str(directory.path), device="cpu", json=True))
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(recorded, rel=1e-6)
    dataset = open_one_dataset(small.data)
    batches = dataset.stream("validation", 32, seed=0).evaluation_batches(8)
    model = open_model(str(directory.path)).model
    across = evaluate_language_model(model, batches, dataset.tokenizer.token_bytes())
    assert across.per("token") != pytest.approx(recorded, rel=1e-6)  # the control


def test_changed_or_unknown_packing_is_refused(recipe: Build, capsys: pytest.CaptureFixture[str]) -> None:
    now, before = (flatten(packed(recipe, name)) for name in ("best-fit", "stream"))
    (changed,) = incompatible_settings(now, before)
    assert "packing=best-fit" in changed
    assert main(["train", "shakespeare-char-cpu", "--packing", "bestfit"]) == 2
    complaint = capsys.readouterr().err
    assert "packing" in complaint
    assert "Traceback" not in complaint
