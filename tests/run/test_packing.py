"""Runs whose rows are packed in each of the three ways."""

from __future__ import annotations

import json
import shutil

import pytest

from overnight.conversion.open_model import open_model
from overnight.data import DataConfig, MixtureSource
from overnight.data.dataset import open_one_dataset
from overnight.evaluation.perplexity import evaluate_language_model
from overnight.recipe import flatten, incompatible_settings

PACKINGS = ("stream", "documents", "best-fit")


@pytest.fixture
def packed(recipe):
    """`packed(packing, **changes)`: four steps with that packing, some two epochs."""
    return lambda packing, **changes: recipe(
        **{"packing": packing, "dropout": 0.0, "total_steps": 4, "warmup_steps": 1} | changes
    )


def choices_of(run):
    return json.loads(run.environment.read_text())["choices"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_run_is_resumed_to_the_bit(packed, train_to, fingerprint, packing, dropout):
    small = packed(packing, dropout=dropout)
    assert fingerprint(train_to(small, "resumed", 2)) == fingerprint(train_to(small, "whole"))


def test_each_packing_trains_on_other_rows(packed, train_to):
    """The comparison above detects a difference, and a run records how its rows are packed."""
    runs = {name: train_to(packed(name), name) for name in PACKINGS}
    losses = [tuple(line["loss"] for line in run.read_metrics()) for run in runs.values()]
    assert len(set(losses)) == 3
    assert "one document after the other" in choices_of(runs["documents"])["attention"]
    assert "cut off in an epoch" in choices_of(runs["best-fit"])["packing"]
    assert "packing" not in choices_of(runs["stream"])
    for name, run in runs.items():
        assert f'packing = "{name}"' in run.recipe.read_text()


def test_each_source_of_a_mixture_is_packed(packed, prepared, tmp_path, train_to, fingerprint):
    other = shutil.copytree(prepared, tmp_path / "other")
    sources = (MixtureSource(path=str(prepared), weight=2), MixtureSource(path=str(other), weight=1))
    mixed = packed("best-fit", data=DataConfig(mixture=sources))
    whole = train_to(mixed, "whole")
    choice = choices_of(whole)["packing"]
    assert choice.count("cut off in an epoch") == 2
    assert f"{other}: " in choice
    assert fingerprint(train_to(mixed, "resumed", 2)) == fingerprint(whole)


def test_run_within_documents_is_evaluated_within_documents(packed, train_to, evaluate):
    small = packed("documents")
    directory = train_to(small, "run")
    recorded = directory.read_events("evaluations")[-1]["loss"]
    assert evaluate(directory.path)["loss"] == pytest.approx(recorded, rel=1e-6)
    dataset = open_one_dataset(small.data)
    batches = dataset.stream("validation", 32, seed=0).evaluation_batches(8)
    model = open_model(str(directory.path)).model
    across = evaluate_language_model(model, batches, dataset.tokenizer.token_bytes())
    assert across.per("token") != pytest.approx(recorded, rel=1e-6)  # the control


def test_changed_packing_is_refused(packed):
    (changed,) = incompatible_settings(flatten(packed("best-fit")), flatten(packed("stream")))
    assert "packing=best-fit" in changed
