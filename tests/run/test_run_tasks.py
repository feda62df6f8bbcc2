"""A run judged on tasks while it trains: the same run, with a line for each metric."""

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
    """Files of two tasks, in characters that the model knows."""
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
    asked = EvaluationConfig(
        evaluate_every_steps=4, tasks=("hellaswag", "lambada"), task_examples=20, task_files=str(files)
    )
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def test_a_run_with_tasks_is_the_run_without_them(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, judged = RunDirectory(tmp_path / "math"), RunDirectory(tmp_path / "judged")
    train.run(recipe(), plain)
    capsys.readouterr()
    train.run(recipe(evaluation=evaluation(files)), judged)
    assert "hellaswag accuracy_per_token 0." in capsys.readouterr().err

    def trace(directory: RunDirectory) -> list[tuple[float, ...]]:
        names = ("step", "loss", "grad_norm", "learning_rate")
        return [tuple(line[name] for name in names) for line in directory.read_metrics()]

    assert trace(plain) == trace(judged)
    assert plain.read_events("evaluations") == judged.read_events("evaluations")
    assert plain.read_events("samples") == judged.read_events("samples")
    assert plain.read_events("tasks") == []
    here, there = (read_model(each.checkpoints / "step-00000012").weights() for each in (plain, judged))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


def test_each_metric_has_a_line_that_the_command_confirms(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "judged")
    train.run(recipe(evaluation=evaluation(files, tasks_every_steps=5)), directory)
    lines = directory.read_events("tasks")
    assert [line["step"] for line in lines if line["metric"] == "accuracy"] == [5, 10, 12]
    assert [line["metric"] for line in lines[:5]] == [*METRICS, "accuracy", "perplexity_per_word"]
    capsys.readouterr()
    tasks = ("hellaswag,lambada",)
    evaluation_command.run(
        EvaluateConfig(
            model=str(directory.path),
            tasks=tasks,
            examples=20,
            task_files=str(files),
            device="cpu",
            json=True,
        )
    )
    scores = json.loads(capsys.readouterr().out)["tasks"]
    assert [each["value"] for each in scores] == [line["value"] for line in lines[-5:]]
    for each, line in zip(scores, lines[-5:], strict=True):
        assert (line["low"], line["high"]) == (each["interval"]["low"], each["interval"]["high"])
        assert line["examples"] == each["examples"]


def test_lines_of_steps_that_are_done_again_are_written_once(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "judged")
    asked = recipe(evaluation=evaluation(files, tasks_every_steps=2))
    complete = train.run(asked, directory)
    whole = directory.read_events("tasks")
    (directory.checkpoints / "step-00000012").rename(tmp_path / "lost")
    train.run(complete, directory, resume=True)
    assert directory.read_events("tasks") == whole


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"tasks": ("helaswag",)}, "there is no task helaswag among .*; did you mean hellaswag"),
        ({"tasks": ("validation",)}, "a run is judged on validation text by evaluate_every_steps"),
        ({"tasks": ("lm-eval:piqa",)}, "only by `overnight evaluate`"),
        ({"tasks": ("piqa",)}, r"has no piqa_valid\.jsonl: fetch https://"),
        ({"task_examples": 0}, "task_examples=0 must be at least 1"),
    ],
)
def test_tasks_that_can_not_be_judged_are_refused_before_the_run(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    directory = RunDirectory(tmp_path / "judged")
    with pytest.raises(ValueError, match=complaint):
        train.run(recipe(evaluation=evaluation(files, **changes)), directory)
    assert not directory.path.exists()


def test_judging_leaves_the_model_and_the_noise_as_they_were(
    recipe: Callable[..., Recipe], files: Path, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "run")
    train.run(recipe(), directory)
    model = read_model(directory.checkpoints / "step-00000012").train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    task = open_task("lambada", files)
    tokenizer = open_model(str(directory.path)).tokenizer
    assert list(evaluate_task(model, task.encode(tokenizer, 32), "fp32"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
