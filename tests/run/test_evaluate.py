"""`overnight evaluate` against the evaluations of the run itself, on validation text and on tasks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from overnight.cli import main
from overnight.conversion import ConvertConfig
from overnight.conversion import command as conversion_command
from overnight.conversion.open_model import open_model
from overnight.evaluation import EvaluateConfig, multiple_choice
from overnight.evaluation import command as evaluation_command
from overnight.evaluation.results import evaluate_opened, open_evaluated_models
from overnight.evaluation.tasks import TASKS
from overnight.recipe import EvaluationConfig
from overnight.run import train
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.load import read_model

ACCURACIES = ["accuracy_per_token", "accuracy_per_character", "accuracy_by_sum"]


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A run of two steps in bf16."""
    directory = RunDirectory(tmp_path_factory.mktemp("trained") / "small")
    train.train_recipe(recipe(precision="bf16", total_steps=2, warmup_steps=0), directory)
    return directory


@pytest.fixture
def converted(trained, tmp_path):
    """The same model as a Hugging Face folder."""
    return conversion_command.run(ConvertConfig(model=str(trained.path), out=str(tmp_path / "theirs")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files of two tasks, in characters of the model's vocabulary."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"ctx": f"Line {number}", "endings": ["of", "a text", "about", "the line"], "label": number % 4}
        for number in range(40)
    ]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "lambada_test.jsonl").write_text('{"text": "Line 1 of a small text"}\n' * 5)
    return str(folder)


def test_all_models_are_evaluated_in_one_precision(trained, converted, prepared, evaluate):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        how = {"data": str(prepared), "precision": precision}
        own, other = (evaluate(model, **how) for model in (trained.path, converted))
        assert own["precision"] == other["precision"] == precision
        assert own["loss"] == other["loss"]
        compared = evaluate(trained.path, **how, baseline=str(converted))["tasks"][0]
        assert compared["value"] == compared["against"]["value"] == own["loss"]
        losses[precision] = own["loss"]
    assert evaluate(trained.path)["loss"] == losses["fp32"], "the default"
    assert losses["bf16"] == pytest.approx(trained.read_events("evaluations")[-1]["loss"], rel=1e-9)
    assert len({*losses.values()}) == 3, "the negative control"
    assert max(losses.values()) == pytest.approx(min(losses.values()), abs=0.01)


def test_evaluate_prints_precision_with_each_task(trained, files, capsys):
    words = ["--tasks", "validation,hellaswag,lambada", "--task-files", files, "--precision", "bf16"]
    assert main(["evaluate", str(trained.path), *words]) == 0
    assert capsys.readouterr().err.count(", in bf16\n") == 3


def test_evaluate_published_run(trained, tmp_path):
    """Only recipe, tokenizer and checkpoints."""
    published = RunDirectory(shutil.copytree(trained.path, tmp_path / "published"))
    for path in (published.environment, published.metrics):
        path.unlink()
    (model,) = open_evaluated_models(EvaluateConfig(model=str(published.path)), "cpu")
    assert model.recipe is not None


def test_evaluate_refuses_other_data_in_the_folder_of_the_run(trained, prepared, evaluate, tmp_path):
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "copy"))
    evaluate(run.path)
    facts = json.loads(run.data.read_text())
    run.data.write_text(json.dumps({**facts, "documents": facts["documents"] + 1}))
    with pytest.raises(ValueError, match=f"{prepared} is not the data that {run.path} was trained on"):
        evaluate(run.path)
    evaluate(run.path, data=str(prepared))  # named by the user


def test_evaluate_refuses_text_of_other_tokenizer(trained, converted, prepare_texts, evaluate, tmp_path):
    notes = [f"Note {number}: {number} is a number, and this is a sentence." for number in range(40)]
    other = prepare_texts(tmp_path / "other", notes)
    for model, folder in ((trained.path, trained.tokenizer), (converted, converted)):
        with pytest.raises(ValueError, match=f"--tokenizer {re.escape(str(folder))}$"):
            evaluate(model, data=str(other))
        remedy = prepare_texts(tmp_path / f"as-{folder.name}", notes, tokenizer=str(folder))
        evaluate(model, data=str(remedy))


def test_evaluate_validation_and_task_with_baseline(trained, files, evaluate):
    settings = {"tasks": ("validation,hellaswag",), "task_files": files, "stride": 16}
    found = evaluate(trained.path, **settings, baseline=str(trained.path))
    scores = {(each["task"], each["metric"]): each for each in found["tasks"]}
    for metric, value in (("nats_per_token", found["loss"]), ("bits_per_byte", found["bits_per_byte"])):
        assert scores["validation", metric]["value"] == pytest.approx(value, rel=1e-12)
    assert scores["validation", "nats_per_token"]["against"]["difference"]["high"] == 0.0
    assert [metric for task, metric in scores if task == "hellaswag"] == ACCURACIES
    for metric in ACCURACIES:
        each = scores["hellaswag", metric]
        assert each["examples"] == 40
        assert each["against"]["probability"] == 1.0, "the same model"
        assert each["against"]["only_here"] == each["against"]["only_there"] == 0
    for each in scores.values():
        assert each["interval"], "negative control of test_few_examples_have_no_interval"
        assert each["interval"]["low"] <= each["value"] <= each["interval"]["high"]
    # The interface of a notebook gives the same.
    results = evaluate_opened(
        open_model(str(trained.path)), EvaluateConfig(model=str(trained.path), **settings)
    )
    assert results.to_dict() == evaluate(trained.path, **settings)
    assert max(map(len, str(results).splitlines())) <= 80
    assert "hellaswag" in results._repr_html_()


def test_evaluate_stride_keeps_tokens(trained, evaluate):
    found = {stride: evaluate(trained.path, stride=stride) for stride in (None, 16, 4)}
    assert len({(each["evaluated_tokens"], each["evaluated_bytes"]) for each in found.values()}) == 1
    assert len({each["loss"] for each in found.values()}) == 3
    assert found[4]["loss"] == pytest.approx(found[None]["loss"], abs=0.1)
    with pytest.raises(ValueError, match="stride of 4000"):
        evaluate(trained.path, stride=4000)


def test_interrupted_evaluation_continues(trained, files, evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"tasks": ("hellaswag",), "task_files": files}
    whole = evaluate(trained.path, **settings)
    monkeypatch.setattr(multiple_choice, "TOKENS_AT_ONCE", 100)
    evaluate_rows, batches = multiple_choice._evaluate_rows, 0

    def interrupted(*arguments):
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


def test_evaluate_needs_a_task_and_a_baseline_that_exists(trained):
    config = EvaluateConfig(model=str(trained.path), device="cpu")
    for changes, message in (({"tasks": ()}, "validation, hellaswag"), ({"baseline": "./other"}, "./other")):
        with pytest.raises(ValueError, match=message):
            evaluation_command.run(dataclasses.replace(config, **changes))


def test_evaluate_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = re.findall(r"[a-z0-9-]+", capsys.readouterr().out)
    assert not {"validation", *TASKS} - {*words}


@pytest.mark.parametrize("task", ["validation", "hellaswag", "lambada"])
@pytest.mark.parametrize(
    ("factor", "precision", "is_finite"),
    [
        (math.nan, "fp32", False),
        (3e38, "fp32", False),  # finite weights whose products are not
        (1e6, "fp16", False),
        (1e6, "fp32", True),
        (1.0, "fp16", True),
    ],
)
def test_loss_that_is_not_finite_ends_with_status_1(
    trained, converted, prepared, files, capsys, task, factor, precision, is_finite
):
    weights = load_file(converted / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file({**weights, name: weights[name] * factor}, converted / "model.safetensors", {"format": "pt"})
    words = ["--tasks", task, "--task-files", files, "--data", str(prepared), "--precision", precision]
    for models in ([str(converted)], [str(trained.path), "--baseline", str(converted)]):
        assert main(["evaluate", *models, *words, "--json"]) == (0 if is_finite else 1)
        output, errors = capsys.readouterr()
        assert bool(output) == is_finite
        assert ("not finite" in errors) != is_finite


def test_few_examples_have_no_interval(trained, files, evaluate, capsys):
    how = {"tasks": ("validation,lambada",), "task_files": files, "baseline": str(trained.path)}
    few = evaluate(trained.path, **how)["tasks"]
    assert few[0]["interval"] is few[0]["against"]["difference"] is None
    lambada = {each["metric"]: each["interval"] for each in few if each["task"] == "lambada"}
    assert lambada["accuracy"]["method"] == "Wilson", "which holds for few"
    assert lambada["perplexity_per_word"] is None
    assert main(["evaluate", str(trained.path), "--baseline", str(trained.path)]) == 0
    errors = capsys.readouterr().err
    assert "no interval from fewer than 20 pieces" in errors
    assert "no paired test of fewer than 20 pieces" in errors


@pytest.fixture
def with_tasks(files):
    """`with_tasks(**changes)`: evaluations on both tasks."""
    both = EvaluationConfig(
        evaluate_every_steps=4, tasks=("hellaswag", "lambada"), task_examples=20, task_files=files
    )
    return lambda **changes: dataclasses.replace(both, **changes)


def test_tasks_do_not_change_run(recipe, finished_run, metrics_of, train_to, with_tasks):
    evaluated = train_to(recipe(evaluation=with_tasks()), "evaluated")
    assert metrics_of(finished_run) == metrics_of(evaluated)
    for kind in ("evaluations", "samples"):
        assert finished_run.read_events(kind) == evaluated.read_events(kind)
    assert finished_run.read_events("tasks") == []
    last = "step-00000012"
    here, there = (read_model(each.checkpoints / last).weights() for each in (finished_run, evaluated))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


def test_task_lines_match_evaluate_command(
    recipe, train_to, resume, with_tasks, files, tmp_path, evaluate, capsys
):
    directory = train_to(recipe(evaluation=with_tasks(tasks_every_steps=5)), "run")
    assert "hellaswag accuracy_per_token 0." in capsys.readouterr().err
    lines = directory.read_events("tasks")
    assert [line["step"] for line in lines if line["metric"] == "accuracy"] == [5, 10, 12]
    assert [line["metric"] for line in lines[:5]] == [*ACCURACIES, "accuracy", "perplexity_per_word"]
    found = evaluate(directory.path, tasks=("hellaswag,lambada",), examples=20, task_files=files)
    for each, line in zip(found["tasks"], lines[-5:], strict=True):
        ends = each["interval"] or {}
        assert {"low": ends.get("low"), "high": ends.get("high")} == {
            "low": line.get("low"),
            "high": line.get("high"),
        }
        assert (each["value"], each["examples"]) == (line["value"], line["examples"])
    # A resumed run writes no line twice.
    (directory.checkpoints / "step-00000012").rename(tmp_path / "lost")
    resume(directory)
    assert directory.read_events("tasks") == lines


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"tasks": ("piqa",)}, "https://"),
        ({"tasks": ("validation",)}, "evaluate_every_steps"),
        ({"tasks": ("lm-eval:piqa",)}, "overnight evaluate"),
        ({"task_examples": 0}, "task_examples=0"),
    ],
)
def test_invalid_tasks_are_refused_before_the_run(recipe, refusal, with_tasks, tmp_path, changes, named):
    assert named in refusal(recipe(evaluation=with_tasks(**changes)), tmp_path / "run")
