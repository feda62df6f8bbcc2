"""`overnight evaluate` against what a run found out about itself."""

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
from overnight.evaluation import EvaluateConfig, multiple_choice
from overnight.evaluation import command as evaluation_command
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
    train.run(recipe(compute=compute, schedule=ScheduleConfig(total_steps=2, warmup_steps=0)), directory)
    return directory


@pytest.fixture
def converted(trained: RunDirectory, tmp_path: Path) -> Path:
    """The same model as a Hugging Face folder."""
    return conversion_command.run(ConvertConfig(model=str(trained.path), out=str(tmp_path / "theirs")))


def test_a_run_is_judged_in_its_own_precision_and_any_other_model_in_fp32(
    trained: RunDirectory, converted: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for model, precision in ((trained.path, "bf16"), (converted, "fp32")):
        evaluation_command.run(EvaluateConfig(model=str(model), data=str(prepared), device="cpu", json=True))
        out, said = capsys.readouterr()
        assert json.loads(out)["precision"] == precision
        assert f"of {prepared}, in {precision}\n" in said
        found[precision] = json.loads(out)["loss"]
    assert found["bf16"] == pytest.approx(trained.read_events("evaluations")[-1]["loss"], rel=1e-9)
    assert found["bf16"] != pytest.approx(found["fp32"], rel=1e-9)
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.01)


def test_a_run_without_what_only_going_on_needs_is_judged(trained: RunDirectory) -> None:
    """As one publishes it: recipe, tokenizer, checkpoints."""
    for path in (trained.environment, trained.metrics):
        path.unlink()
    assert (
        evaluation_command.open_evaluated_models(EvaluateConfig(model=str(trained.path)), "cpu")[0].recipe
        is not None
    )


def test_text_of_another_tokenizer_is_answered_with_the_folder_of_the_right_one(
    trained: RunDirectory, converted: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"Note {number}: {number} is a number, and this is a sentence.")

    def prepare_with(tokenizer: str, name: str) -> str:
        prepare(
            PrepareConfig(
                source=str(notes), out=str(tmp_path / name), tokenizer=tokenizer, validation_fraction=0.3
            )
        )
        return str(tmp_path / name)

    strange = prepare_with("characters", "strange")
    for model, folder in ((trained.path, trained.tokenizer), (converted, converted)):
        with pytest.raises(ValueError, match=f"--tokenizer {re.escape(str(folder))}$"):
            evaluation_command.run(EvaluateConfig(model=str(model), data=strange, device="cpu"))
        remedy = prepare_with(str(folder), f"as-{folder.name}")
        evaluation_command.run(EvaluateConfig(model=str(model), data=remedy, device="cpu"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A folder with a file of HellaSwag's kind, in characters that the model knows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {"ctx": f"Line {number}", "endings": ["of", "a text", "about", "the line"], "label": number % 4}
        for number in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "hellaswag_val.jsonl").write_text(text)
    return folder


def test_tasks_are_judged_beside_the_validation_loss(
    trained: RunDirectory, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        model=str(trained.path),
        tasks=("validation,hellaswag",),
        task_files=str(questions),
        against=str(trained.path),
        device="cpu",
        json=True,
    )
    evaluation_command.run(config)
    out, said = capsys.readouterr()
    found = json.loads(out)
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
        assert each["against"]["probability"] == 1.0, "a model beside itself"
        assert each["against"]["only_here"] == each["against"]["only_there"] == 0
    for each in scores.values():
        assert each["interval"]["low"] <= each["value"] <= each["interval"]["high"]
    assert "hellaswag: 40 questions, chance 0.25" in said
    assert "0.2955   OpenAI 124M" in said
    assert max(map(len, said.splitlines())) <= 80 or str(trained.path) in said


def test_a_stride_judges_the_same_tokens_after_more_of_the_text(
    trained: RunDirectory, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for stride in (None, 16, 4):
        evaluation_command.run(
            EvaluateConfig(model=str(trained.path), stride=stride, device="cpu", json=True)
        )
        found[stride] = json.loads(capsys.readouterr().out)
    amounts = {(each["evaluated_tokens"], each["evaluated_bytes"]) for each in found.values()}
    assert len(amounts) == 1
    assert len({each["loss"] for each in found.values()}) == 3
    assert found[4]["loss"] == pytest.approx(found[None]["loss"], abs=0.1)
    with pytest.raises(ValueError, match="a stride of 4000 must be at least 1 and at most the context"):
        evaluation_command.run(EvaluateConfig(model=str(trained.path), stride=4000, device="cpu"))


def test_an_interrupted_evaluation_goes_on(
    trained: RunDirectory,
    questions: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = EvaluateConfig(
        model=str(trained.path),
        tasks=("hellaswag",),
        task_files=str(questions),
        device="cpu",
        json=True,
    )
    evaluation_command.run(config)
    whole = capsys.readouterr().out
    monkeypatch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
    judge, judged = multiple_choice._judge, 0

    def cut_short(*arguments: Any) -> Any:
        nonlocal judged
        judged += 1
        if judged == 4:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(multiple_choice, "_judge", cut_short)
    with pytest.raises(KeyboardInterrupt):
        evaluation_command.run(config)
    before = judged
    evaluation_command.run(config)
    rest = judged - before
    assert capsys.readouterr().out == whole
    judged = 100
    evaluation_command.run(config)
    assert judged - 100 == rest + 3, "the control: nothing is remembered of what is finished"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"tasks": ("helaswag",)}, "there is no task helaswag among .*; did you mean hellaswag"),
        ({"tasks": ("piqa",)}, r"has no piqa_valid\.jsonl: fetch https://"),
        ({"tasks": ()}, "name a task: validation, hellaswag"),
        ({"against": "./other"}, "there is no model ./other"),
        ({"examples": 0}, "--examples=0 must be at least 1, or left out"),
    ],
)
def test_a_task_that_can_not_be_judged_is_refused(
    trained: RunDirectory, questions: Path, changes: dict[str, object], complaint: str
) -> None:
    values: dict[str, object] = {"model": str(trained.path), "task_files": str(questions), "device": "cpu"}
    with pytest.raises(ValueError, match=complaint):
        evaluation_command.run(EvaluateConfig(**{**values, **changes}))  # type: ignore[arg-type]


def test_the_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = re.findall(r"[a-z0-9-]+", capsys.readouterr().out)
    assert not {"validation", *TASKS} - {*words}


def test_a_model_of_no_numbers_is_told_in_strict_json(
    trained: RunDirectory,
    converted: Path,
    prepared: Path,
    questions: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = load_file(converted / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file({**weights, name: weights[name] * math.nan}, converted / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    evaluation_command.run(
        EvaluateConfig(
            model=str(converted),
            data=str(prepared),
            tasks=("validation,hellaswag",),
            task_files=str(questions),
            device="cpu",
            json=True,
        )
    )
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["loss"] is None
    assert found["tasks"][0]["value"] is None
    reference = next(each for each in found["tasks"] if each["references"])["references"][0]
    assert reference == {"whose": "OpenAI 124M", "value": 0.2955, "source": "build-nanogpt, hellaswag.py"}
