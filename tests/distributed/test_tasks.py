"""Tasks judged by several processes are judged the same to the digit, in a run and by the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from overnight.recipe import EvaluationConfig

distributed = pytest.mark.distributed


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Questions and passages of many lengths."""
    folder = tmp_path / "files"
    folder.mkdir()
    words = ["the", "text", "of", "a", "line", "and", "what", "stands", "in", "it"]
    questions = [
        {
            "ctx": " ".join(words[: 1 + number % 5]),
            "endings": [" ".join(words[each : each + 1 + number % 3]) for each in range(4)],
            "label": number % 4,
        }
        for number in range(37)
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    passages = [{"text": " ".join(words[: 2 + number % 4])} for number in range(23)]
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in passages))
    return folder


@pytest.mark.parametrize(
    "size, machines, sharding",
    [
        (2, 1, "none"),
        pytest.param(2, 1, "fsdp", marks=distributed),
        pytest.param(3, 1, "none", marks=distributed),
        pytest.param(4, 1, "zero1", marks=distributed),
        pytest.param(4, 2, "hsdp", marks=distributed),
    ],
)
def test_a_run_is_judged_the_same_by_any_team(
    trained: Any, team: Any, recipe: Any, files: Path, tmp_path: Path, size: int, machines: int, sharding: str
) -> None:
    run = trained(1, sharding="none", total_steps=5)
    asked = EvaluationConfig(tasks=("hellaswag", "lambada"), task_files=str(files))
    found = []
    for name, (count, of, kind) in {"alone": (1, 1, "none"), "team": (size, machines, sharding)}.items():
        given = dataclasses.replace(
            recipe(sharding=kind, rows=48 if count == 3 else 16, total_steps=5), evaluation=asked
        )
        team("judge_tasks", given, run.newest, tmp_path / name, size=count, machines=of)
        lines = type(run.directory)(tmp_path / name).read_events("tasks")
        found.append([line | {"tokens": 0} for line in lines])
    assert found[0] == found[1]
    assert len(found[0]) == 3 + 2
    assert {line["examples"] for line in found[0]} == {37, 23}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=distributed)])
def test_the_command_says_the_same_once(trained: Any, team: Any, files: Path, size: int) -> None:
    run = trained(1, sharding="none", total_steps=5)
    values = {
        "model": str(run.directory.path),
        "tasks": ("validation,hellaswag,lambada",),
        "task_files": str(files),
        "device": "cpu",
        "json": True,
    }
    (alone,) = team("evaluate", values, size=1)
    first, *others = team("evaluate", values, size=size)
    assert json.loads(first) == json.loads(alone)
    assert others == [""] * (size - 1), "the main process speaks for all"
    (strided,) = team("evaluate", {**values, "stride": 8}, size=1)
    assert json.loads(strided)["loss"] != json.loads(alone)["loss"], "the control"
    assert team("evaluate", {**values, "stride": 8}, size=size)[0] == strided
