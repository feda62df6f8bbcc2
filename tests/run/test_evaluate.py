"""`overnight evaluate` against the evaluation of the run itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from overnight.cli import main
from overnight.conversion import ConvertConfig
from overnight.conversion import command as conversion_command
from overnight.conversion.open_model import open_model
from overnight.evaluation import EvaluateConfig, multiple_choice
from overnight.evaluation import command as evaluation_command
from overnight.evaluation.results import evaluate_opened, open_evaluated_models
from overnight.evaluation.tasks import TASKS
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training import ComputeConfig
from overnight.training.schedule import ScheduleConfig


@pytest.fixture
def trained(recipe: Callable[..., Recipe], tmp_path: Path) -> RunDirectory:
    """A run of two steps in bf16."""
    directory = RunDirectory(tmp_path / "small")
    compute = ComputeConfig(device="cpu", precision="bf16", compile=False)
    train.train(recipe(compute=compute, schedule=ScheduleConfig(total_steps=2, warmup_steps=0)), directory)
    return directory


@pytest.fixture
def converted(trained: RunDirectory, tmp_path: Path) -> Path:
    """The same model as a Hugging Face folder."""
    return conversion_command.run(ConvertConfig(model=str(trained.path), out=str(tmp_path / "theirs")))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A folder with a file in HellaSwag's format, in characters of the model's vocabulary."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {"ctx": f"Line {number}", "endings": ["of", "a text", "about", "the line"], "label": number % 4}
        for number in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "hellaswag_val.jsonl").write_text(text)
    return folder


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the command; returns its JSON, strictly parsed."""

    def evaluate(model: Path, **settings: Any) -> dict[str, Any]:
        capsys.readouterr()
        evaluation_command.run(EvaluateConfig(model=str(model), device="cpu", json=True, **settings))
        found: dict[str, Any] = json.loads(
            capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
        )
        return found

    return evaluate


def test_evaluate_precision_is_the_runs_own(
    trained: RunDirectory, converted: Path, prepared: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    own, other = (evaluate(model, data=str(prepared)) for model in (trained.path, converted))
    assert (own["precision"], other["precision"]) == ("bf16", "fp32")
    assert own["loss"] == pytest.approx(trained.read_events("evaluations")[-1]["loss"], rel=1e-9)
    assert own["loss"] != pytest.approx(other["loss"], rel=1e-9)
    assert own["loss"] == pytest.approx(other["loss"], abs=0.01)


def test_evaluate_published_run(trained: RunDirectory) -> None:
    """Only recipe, tokenizer and checkpoints."""
    for path in (trained.environment, trained.metrics):
        path.unlink()
    (model,) = open_evaluated_models(EvaluateConfig(model=str(trained.path)), "cpu")
    assert model.recipe is not None


def test_evaluate_refuses_text_of_other_tokenizer(
    trained: RunDirectory, converted: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"Note {number}: {number} is a number, and this is a sentence.")

    def prepare_with(tokenizer: str, name: str) -> str:
        out = str(tmp_path / name)
        prepare(PrepareConfig(source=str(notes), out=out, tokenizer=tokenizer, validation_fraction=0.3))
        return out

    other = prepare_with("characters", "other")
    for model, folder in ((trained.path, trained.tokenizer), (converted, converted)):
        with pytest.raises(ValueError, match=f"--tokenizer {re.escape(str(folder))}$"):
            evaluation_command.run(EvaluateConfig(model=str(model), data=other, device="cpu"))
        remedy = prepare_with(str(folder), f"as-{folder.name}")
        evaluation_command.run(EvaluateConfig(model=str(model), data=remedy, device="cpu"))


def test_evaluate_validation_and_task_with_baseline(
    trained: RunDirectory, questions: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    found = evaluate(
        trained.path, tasks=("validation,hellaswag",), task_files=str(questions), baseline=str(trained.path)
    )
    assert found["loss"] == pytest.approx(trained.read_events("evaluations")[-1]["loss"], rel=1e-9)
    scores = {(each["task"], each["metric"]): each for each in found["tasks"]}
    assert scores["validation", "nats_per_token"]["value"] == pytest.approx(found["loss"], rel=1e-12)
    assert scores["validation", "bits_per_byte"]["value"] == pytest.approx(found["bits_per_byte"], rel=1e-12)
    assert scores["validation", "nats_per_token"]["against"]["difference"]["high"] == 0.0
    accuracies = ("accuracy_per_token", "accuracy_per_character", "accuracy_by_sum")
    assert [metric for task, metric in scores if task == "hellaswag"] == list(accuracies)
    for metric in accuracies:
        each = scores["hellaswag", metric]
        assert each["examples"] == 40
        assert each["against"]["probability"] == 1.0, "the same model"
        assert each["against"]["only_here"] == each["against"]["only_there"] == 0
    for each in scores.values():
        assert each["interval"]["low"] <= each["value"] <= each["interval"]["high"]


def test_evaluate_opened_matches_command(
    trained: RunDirectory, questions: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    settings: dict[str, Any] = {"tasks": ("validation", "hellaswag"), "task_files": str(questions)}
    config = EvaluateConfig(model=str(trained.path), **settings)
    results = evaluate_opened(open_model(config.model), config)
    assert results.to_dict() == evaluate(trained.path, **settings)
    assert "hellaswag: 40 questions, chance 0.25" in str(results)
    assert max(map(len, str(results).splitlines())) <= 80
    assert "hellaswag" in results._repr_html_()


def test_evaluate_stride_keeps_tokens(trained: RunDirectory, evaluate: Callable[..., dict[str, Any]]) -> None:
    found = {stride: evaluate(trained.path, stride=stride) for stride in (None, 16, 4)}
    assert len({(each["evaluated_tokens"], each["evaluated_bytes"]) for each in found.values()}) == 1
    assert len({each["loss"] for each in found.values()}) == 3
    assert found[4]["loss"] == pytest.approx(found[None]["loss"], abs=0.1)
    with pytest.raises(ValueError, match="stride of 4000"):
        evaluate(trained.path, stride=4000)


def test_interrupted_evaluation_continues(
    trained: RunDirectory,
    questions: Path,
    evaluate: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"tasks": ("hellaswag",), "task_files": str(questions)}
    whole = evaluate(trained.path, **settings)
    monkeypatch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
    evaluate_rows, batches = multiple_choice._evaluate_rows, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise KeyboardInterrupt
        return evaluate_rows(*arguments)

    monkeypatch.setattr(multiple_choice, "_evaluate_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(trained.path, **settings)
    before = batches
    assert evaluate(trained.path, **settings) == whole
    rest = batches - before
    batches = 100
    evaluate(trained.path, **settings)
    assert batches - 100 == rest + 3, "the negative control: a finished evaluation is not cached"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("helaswag",)}, "helaswag .*hellaswag"),
        ({"tasks": ("piqa",)}, r"piqa_valid\.jsonl.*https://"),
        ({"tasks": ()}, "validation, hellaswag"),
        ({"baseline": "./other"}, "./other"),
        ({"examples": 0}, "--examples=0"),
    ],
)
def test_evaluate_refuses_invalid_settings(
    trained: RunDirectory, questions: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"model": str(trained.path), "task_files": str(questions), "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        evaluation_command.run(EvaluateConfig(**{**settings, **changes}))


def test_evaluate_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = re.findall(r"[a-z0-9-]+", capsys.readouterr().out)
    assert not {"validation", *TASKS} - {*words}


def test_evaluate_json_of_nan_model_is_strict(
    converted: Path, prepared: Path, questions: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    weights = load_file(converted / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file({**weights, name: weights[name] * math.nan}, converted / "model.safetensors", {"format": "pt"})
    tasks = ("validation,hellaswag",)
    found = evaluate(converted, data=str(prepared), tasks=tasks, task_files=str(questions))
    assert found["loss"] is None
    assert found["tasks"][0]["value"] is None
    reference = next(each for each in found["tasks"] if each["references"])["references"][0]
    assert reference == {"whose": "OpenAI 124M", "value": 0.2955, "source": "build-nanogpt, hellaswag.py"}
