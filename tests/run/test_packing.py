"""Runs whose rows are put together in each of the three ways."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overnight.cli import main
from overnight.config import from_toml
from overnight.conversion.open_model import open_model
from overnight.data import MixtureSource
from overnight.data.dataset import open_one_dataset
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.evaluation.perplexity import evaluate_language_model
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, incompatible_settings
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.training.schedule import ScheduleConfig

CLOCK = {"milliseconds", "tokens_per_second", "mfu", "mfu_executed"}
PACKINGS = ("stream", "documents", "best-fit")

Build = Callable[..., Recipe]


def packed(recipe: Build, packing: str, dropout: float = 0.0) -> Recipe:
    """Four steps with that packing, some two epochs."""
    data = dataclasses.replace(recipe().data, packing=packing)  # type: ignore[arg-type]
    model = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=dropout)
    return recipe(data=data, model=model, schedule=ScheduleConfig(total_steps=4, warmup_steps=1))


def train(recipe: Recipe, path: Path, stop: int | None, patch: pytest.MonkeyPatch) -> RunDirectory:
    """To the end, once interrupted after `stop` steps if that is given."""
    directory, left = RunDirectory(path), [stop, None] if stop is not None else [None]
    for begun, steps in enumerate(left):

        @contextlib.contextmanager
        def signalled(steps: int | None = steps) -> Iterator[Callable[[], bool]]:
            asked = iter(range(100))
            yield lambda: steps is not None and next(asked) >= steps

        patch.setattr(train_module, "stop_on_signal", signalled)
        with pytest.raises(KeyboardInterrupt) if steps is not None else contextlib.nullcontext():
            train_module.run(recipe, directory, resume=bool(begun))
        recipe = from_toml(Recipe, directory.recipe.read_text(), "recipe.toml")
    return directory


def records(directory: RunDirectory) -> list[dict[str, object]]:
    """Every metrics line and every event, without the clock."""
    lines = [*directory.read_metrics(), *directory.read_events("evaluations")]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, dropout: float
) -> None:
    small = packed(recipe, packing, dropout)
    whole = records(train(small, tmp_path / "full", None, monkeypatch))
    assert records(train(small, tmp_path / "stopped", 2, monkeypatch)) == whole


def test_each_packing_trains_on_something_else(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above is about something, and the run says how its rows are made."""
    runs = {name: train(packed(recipe, name), tmp_path / name, None, monkeypatch) for name in PACKINGS}
    losses = {name: [line["loss"] for line in run.read_metrics()] for name, run in runs.items()}
    assert len({tuple(each) for each in losses.values()}) == 3
    choices = {name: json.loads(run.environment.read_text())["choices"] for name, run in runs.items()}
    assert choices["documents"]["attention"].endswith("kernel flash, one document after the other")
    assert "cut off in an epoch" in choices["best-fit"]["packing"]
    assert "packing" not in choices["stream"]
    for name, run in runs.items():
        assert f'packing = "{name}"' in run.recipe.read_text()


def test_each_source_of_a_mixture_is_packed_and_says_what_it_cuts_off(
    recipe: Build, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(prepared, tmp_path / "other")
    small = packed(recipe, "best-fit")
    sources = (MixtureSource(path=str(prepared), weight=2), MixtureSource(path=str(other), weight=1))
    mixed = dataclasses.replace(small, data=dataclasses.replace(small.data, data="", mixture=sources))
    whole = train(mixed, tmp_path / "full", None, monkeypatch)
    said = json.loads(whole.environment.read_text())["choices"]["packing"]
    assert said.count("cut off in an epoch") == 2
    assert f"{other}: " in said
    assert records(train(mixed, tmp_path / "stopped", 2, monkeypatch)) == records(whole)


def test_a_run_within_documents_is_judged_within_documents(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = packed(recipe, "documents")
    directory = train(small, tmp_path / "run", None, monkeypatch)
    recorded = directory.read_events("evaluations")[-1]["loss"]
    evaluation_command.run(EvaluateConfig(model=str(directory.path), device="cpu", json=True))
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(recorded, rel=1e-6)
    dataset = open_one_dataset(small.data)
    batches = dataset.stream("validation", 32, seed=0).evaluation_batches(8)
    across = evaluate_language_model(
        open_model(str(directory.path)).model, batches, dataset.tokenizer.token_bytes()
    )
    assert across.loss != pytest.approx(recorded, rel=1e-6)


def test_packing_may_not_change_when_a_run_goes_on(recipe: Build) -> None:
    changed = incompatible_settings(packed(recipe, "best-fit"), packed(recipe, "stream"))
    assert changed == ["packing=best-fit (was stream)"]


def test_a_packing_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="packing = 'bestfit' should be one of 'stream', 'documents', 'best-f"
    ):
        from_toml(Recipe, '[data]\npacking = "bestfit"', "recipe.toml")
    assert main(["train", "shakespeare-char-cpu", "--packing", "bestfit"]) == 2
    complaint = capsys.readouterr().err
    assert "packing" in complaint
    assert "Traceback" not in complaint
