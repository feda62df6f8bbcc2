"""A run evaluated on tasks while it trains: the same run, with a line for each metric."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overnight.conversion.open_model import open_model
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.evaluation.tasks import evaluate_task, open_task
from overnight.recipe import EvaluationConfig, Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.load import read_model

METRICS = ("accuracy_per_token", "accuracy_per_character", "accuracy_by_sum")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of two tasks, in characters of the model's vocabulary."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {"ctx": f"Line {number}", "endings": ["of", "a text", "about", "the line"], "label": number % 4}
        for number in range(40)
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "lambada_test.jsonl").write_text('{"text": "Line 1 of a small text"}\n' * 5)
    return folder


def evaluation(files: Path, **changes: object) -> EvaluationConfig:
    both = EvaluationConfig(
        evaluate_every_steps=4, tasks=("hellaswag", "lambada"), task_examples=20, task_files=str(files)
    )
    return dataclasses.replace(both, **changes)  # type: ignore[arg-type]


def test_tasks_do_not_change_run(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, evaluated = RunDirectory(tmp_path / "plain"), RunDirectory(tmp_path / "evaluated")
    train.train(recipe(), plain)
    capsys.readouterr()
    train.train(recipe(evaluation=evaluation(files)), evaluated)
    assert "hellaswag accuracy_per_token 0." in capsys.readouterr().err

    def trace(directory: RunDirectory) -> list[tuple[float, ...]]:
        names = ("step", "loss", "grad_norm", "learning_rate")
        return [tuple(line[name] for name in names) for line in directory.read_metrics()]

    assert trace(plain) == trace(evaluated)
    assert plain.read_events("evaluations") == evaluated.read_events("evaluations")
    assert plain.read_events("samples") == evaluated.read_events("samples")
    assert plain.read_events("tasks") == []
    here, there = (read_model(each.checkpoints / "step-00000012").weights() for each in (plain, evaluated))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


def test_task_lines_match_evaluate_command(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "run")
    train.train(recipe(evaluation=evaluation(files, tasks_every_steps=5)), directory)
    lines = directory.read_events("tasks")
    assert [line["step"] for line in lines if line["metric"] == "accuracy"] == [5, 10, 12]
    assert [line["metric"] for line in lines[:5]] == [*METRICS, "accuracy", "perplexity_per_word"]
    capsys.readouterr()
    config = EvaluateConfig(model=str(directory.path), tasks=("hellaswag,lambada",), device="cpu", json=True)
    evaluation_command.run(dataclasses.replace(config, examples=20, task_files=str(files)))
    scores = json.loads(capsys.readouterr().out)["tasks"]
    for each, line in zip(scores, lines[-5:], strict=True):
        assert each["value"] == line["value"]
        assert (line["low"], line["high"]) == (each["interval"]["low"], each["interval"]["high"])
        assert line["examples"] == each["examples"]


def test_resumed_run_writes_task_lines_once(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "run")
    resolved = train.train(recipe(evaluation=evaluation(files, tasks_every_steps=2)), directory)
    lines = directory.read_events("tasks")
    (directory.checkpoints / "step-00000012").rename(tmp_path / "lost")
    train.train(resolved.recipe, directory, resume=True)
    assert directory.read_events("tasks") == lines


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("helaswag",)}, "helaswag .*hellaswag"),
        ({"tasks": ("validation",)}, "evaluate_every_steps"),
        ({"tasks": ("lm-eval:piqa",)}, "overnight evaluate"),
        ({"tasks": ("piqa",)}, r"piqa_valid\.jsonl.*https://"),
        ({"task_examples": 0}, "task_examples=0"),
    ],
)
def test_invalid_tasks_are_refused_before_the_run(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train.train(recipe(evaluation=evaluation(files, **changes)), directory)
    assert not directory.path.exists()


def test_evaluating_task_leaves_model_and_random_state_unchanged(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "run")
    train.train(recipe(), directory)
    opened = open_model(str(directory.path))
    model = opened.model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert list(evaluate_task(model, open_task("lambada", files).encode(opened.tokenizer, 32), "fp32"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
