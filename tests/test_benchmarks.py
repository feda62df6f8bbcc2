"""What could make a benchmark lie: the order of the sides, their ratios, whether they do the same work."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.model.model_config import ModelConfig

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=40)


@pytest.fixture
def measure(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["measure"]


# ---------------------------------------------------------------- measuring


def test_sides_are_called_in_turn_and_warm_ups_are_thrown_away(measure: Any) -> None:
    calls: list[str] = []

    def side(name: str) -> Any:
        return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

    results = measure.interleave({name: side(name) for name in "ABC"}, repeats=2, warm_ups=1)
    assert "".join(calls) == "ABCABCABC"
    assert results == {"A": [4, 7], "B": [5, 8], "C": [6, 9]}


def test_no_repeats_are_refused(measure: Any) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        measure.interleave({"A": int}, repeats=0)


def test_a_ratio_is_the_median_of_the_rounds_ratios(measure: Any) -> None:
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 20.0, 20.0]  # the second round met a slow machine
    assert measure.paired_ratio(ours, theirs) == 2.0  # the medians' ratio would be 10
    assert measure.paired_ratio(theirs, theirs) == 1.0
    with pytest.raises(ValueError, match="zip"):
        measure.paired_ratio([1.0], theirs)


def test_a_table_is_aligned_markdown(measure: Any) -> None:
    assert measure.markdown_table(["side", "ms"], [["a", "1,000"], ["longer", "2"]]).splitlines() == [
        "| side   |    ms |",
        "| :----- | ----: |",
        "| a      | 1,000 |",
        "| longer |     2 |",
    ]
    assert measure.spread([3.0, 1.0, 1234.5]) == ["3", "1", "1,234"]


def test_a_report_says_where_and_when_and_holds_every_figure(
    measure: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measure.Report(title="T", headings=["side"], rows=[["a"]], measured={"a": [1.5]}, notes=["N."])
    assert measure.run_plainly(lambda: report, as_json=False) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("### T", "| a    |", "N.", torch.__version__, report.date))
    report.show(as_json=True)
    assert json.loads(capsys.readouterr().out)["measured"] == {"a": [1.5]}


# ---------------------------------------------------------------- the other questions


def test_the_runs_that_are_measured_are_runs(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    from overnight.runs.status import list_runs

    benchmarks["startup"].write_runs(tmp_path, runs=2, steps=5)
    found = list_runs(tmp_path)
    assert [(run.state, run.step, run.problem) for run in found] == [("finished", 5, None)] * 2


def test_a_command_that_fails_is_not_measured(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"):
        benchmarks["startup"].call([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)()


def test_both_generators_write_the_same(benchmarks: dict[str, Any]) -> None:
    generate = benchmarks["generate"]
    ours = generate.build_ours(TINY)
    for weight in ours.parameters():
        weight.data.mul_(20.0)  # far from ties
    theirs = generate.build_theirs(TINY, ours)
    prompts = generate.draw_prompts(3, 4, TINY.vocab_size)
    setting = generate.Setting(rows=3, new=8, top_k=None)
    written = generate.write_ours(ours, prompts, setting)
    assert [len(ids) for ids in written] == [8, 8, 8]
    assert written == generate.write_theirs(theirs, prompts, setting)
    drawn = generate.write_theirs(theirs, prompts, generate.Setting(rows=3, new=8, top_k=5))
    assert [len(ids) for ids in drawn] == [8, 8, 8]


# ---------------------------------------------------------------- evaluation


def far_from_chance(config: ModelConfig) -> Any:
    """A model whose losses differ from window to window."""
    from overnight.model.gpt import GPT, initialize

    model = GPT(config)
    initialize(model, seed=0)
    for weight in model.parameters():
        weight.data.mul_(20.0)
    model.zero_padding()
    return model.eval()


def ask(evaluate: Any, model: Any, batches: int = 3) -> tuple[Any, torch.Tensor]:
    """A question of three batches of two rows, and its text."""
    length = model.config.context_length
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.vocab_size, (batches * 2 * length + 1,), generator=generator)
    batch = evaluate.Rows(text.numpy(), length).batch
    windows = [batch(number * 2, 2) for number in range(batches)]
    return evaluate.Question(batches=windows, precision="fp32", device="cpu"), text


def test_all_judges_agree_on_the_same_windows(benchmarks: dict[str, Any]) -> None:
    evaluate = benchmarks["evaluate"]
    model = far_from_chance(TINY)
    question, _ = ask(evaluate, model)
    theirs = benchmarks["peers"].build_peer("transformers", None, model)
    found = evaluate.judge_theirs(theirs, question)
    assert evaluate.judge_ours(model, question) == pytest.approx(found, abs=1e-4)
    fewer = dataclasses.replace(question, batches=question.batches[:2])
    assert abs(evaluate.judge_theirs(theirs, fewer) - found) > 0.01  # another text has another loss
    assert question.tokens == 3 * 2 * 16


def test_overlapping_windows_judge_every_token_once_after_half_a_window(benchmarks: dict[str, Any]) -> None:
    evaluate = benchmarks["evaluate"]
    model = far_from_chance(TINY)
    question, text = ask(evaluate, model)
    text = text[:-1]  # the last one is only a target
    nats = []
    for place in range(1, len(text)):
        start = 0 if place < 16 else (place // 8 - 1) * 8  # windows begin every 8 tokens
        logits = model(text[None, start:place])[0, -1]
        nats.append(-logits.log_softmax(-1)[text[place]].item())
    theirs = benchmarks["peers"].build_peer("transformers", None, model)
    assert evaluate.judge_strided(theirs, question) == pytest.approx(sum(nats) / len(nats), abs=1e-4)


def test_judges_that_disagree_are_found_out(benchmarks: dict[str, Any]) -> None:
    evaluate = benchmarks["evaluate"]
    losses = {"overnight": 10.0, "nanoGPT": 10.001, evaluate.STRIDED: 9.0}
    assert "within 0.00100 nats." in evaluate.describe_losses(losses)[1]
    assert "DO NOT JUDGE THE SAME" in evaluate.describe_losses(losses | {"nanoGPT": 10.1})[1]


def test_an_evaluation_that_can_t_be_measured_is_refused(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    evaluate = benchmarks["evaluate"]
    for words, sentence in (
        (["--batches", "0"], "--batches 0 is too few"),
        (["--peer", str(tmp_path)], "is not a checkout of build-nanogpt"),
        (["--nanogpt", str(tmp_path)], "is not a checkout of nanoGPT"),
        (["--layers", "0"], "n_layer=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate.check(evaluate.read_options(words))


# ---------------------------------------------------------------- tiny shakespeare


def test_our_shards_are_nanogpt_s_split(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    from overnight.data.loader import TokenStream
    from overnight.data.shards import load_prepared_tokenizer, verify

    shakespeare = benchmarks["shakespeare"]
    characters = "To be, or not to be\n" * 100
    (tmp_path / "input.txt").write_text(characters, encoding="utf-8")
    split = shakespeare.read_split(tmp_path / "input.txt", None)
    assert (split.train, split.validation) == (characters[:1800], characters[1800:])
    shakespeare.prepare_ours(split, tmp_path / "prepared")
    manifest = verify(tmp_path / "prepared")
    assert (manifest.tokens("train"), manifest.tokens("validation")) == (1801, 201)
    tokenizer = load_prepared_tokenizer(tmp_path / "prepared")
    (batch,) = TokenStream(tmp_path / "prepared", "validation", tokens_per_row=200).evaluation_batches(1)
    assert tokenizer.decode(batch.targets[0].tolist()) == split.validation
    assert batch.targets[0].tolist() == shakespeare.encode(split).tolist()  # their ids are ours


def test_a_text_that_is_not_there_is_asked_for(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    shakespeare = benchmarks["shakespeare"]
    for text in (None, tmp_path / "input.txt"):
        with pytest.raises(ValueError, match=r"name with --text the input\.txt of tiny shakespeare"):
            shakespeare.read_split(text, tmp_path)
    (tmp_path / "input.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="is too short"):
        shakespeare.read_split(tmp_path / "input.txt", None)


def test_both_are_judged_at_every_position_of_every_window(benchmarks: dict[str, Any]) -> None:
    shakespeare = benchmarks["shakespeare"]
    model = far_from_chance(dataclasses.replace(TINY, context_length=64))
    ids = torch.randint(40, (64 * 5 + 30,), generator=torch.Generator().manual_seed(0))
    nats = []
    for window in range(5):
        for place in range(64):
            start, end = window * 64, window * 64 + place + 1
            nats.append(-model(ids[None, start:end])[0, -1].log_softmax(-1)[ids[end]].item())
    found = shakespeare.judge_whole(model, ids.numpy())
    assert found == pytest.approx(sum(nats) / len(nats), abs=1e-4)


def test_our_recipe_is_nanogpt_s(
    benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overnight import cli
    from overnight.recipe import flatten
    from overnight.run import command as run_command

    shakespeare, recipes = benchmarks["shakespeare"], []
    monkeypatch.setattr(run_command, "run", lambda recipe, resumed: recipes.append(flatten(recipe)))
    command = shakespeare.command_of_ours(tmp_path, steps=2000, seed=7)
    assert cli.main(command[command.index("train") :]) == 0
    theirs = dict(word.removeprefix("--").split("=") for word in shakespeare.command_of_theirs(2000)[3:])
    pairs = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "dropout": "dropout"}
    pairs |= {"context_length": "block_size", "total_steps": "max_iters", "device": "device"}
    assert {name: str(recipes[0][name]) for name in pairs} == {name: theirs[pairs[name]] for name in pairs}
    assert recipes[0]["tokens_per_step"] == int(theirs["batch_size"]) * int(theirs["block_size"])
    judged = 2 * int(theirs["eval_iters"]) * recipes[0]["tokens_per_step"]  # theirs judges both splits
    assert recipes[0]["evaluation_tokens"] == judged
    # What their config file and train.py say beside the command.
    expected = {"peak_learning_rate": 1e-3, "beta2": 0.99, "warmup_steps": 100, "weight_decay": 0.1}
    expected |= {"max_grad_norm": 1.0, "evaluate_every_steps": 250, "final_learning_rate_fraction": 0.1}
    assert {name: recipes[0][name] for name in expected} == expected
    assert recipes[0]["learning_rate_decay"] == "cosine"
    assert recipes[0]["sample_every_steps"] is None
    assert (recipes[0]["seed"], recipes[0]["data"]) == (7, str(tmp_path))


def test_the_two_take_turns_and_each_run_of_ours_has_its_own_seed(
    benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shakespeare = benchmarks["shakespeare"]
    commands = []

    def run(command: list[str], folder: Path) -> tuple[Any, str]:
        commands.append(command)
        if "train" in command:
            (folder / "runs" / "measured").mkdir(parents=True)  # fails if the run before is still there
            (folder / "runs" / "measured" / "metrics.jsonl").write_text('{"milliseconds": 3}\n' * 3)
        seconds = 40.0 if "train.py" in command else 10.0
        printed = "iter 0: loss 4.2, time 9.00ms, mfu\niter 1: loss 4.1, time 7.00ms, mfu\n"
        return shakespeare.Took(seconds, 2 * seconds), printed

    monkeypatch.setattr(shakespeare, "run_timed", run)
    monkeypatch.setattr(shakespeare, "load_ours", lambda folder: folder)
    monkeypatch.setattr(shakespeare, "load_theirs", lambda folder, checkpoint: folder)
    monkeypatch.setattr(shakespeare, "read_definitions", lambda program, checkout: None)
    monkeypatch.setattr(shakespeare, "fingerprint", lambda path: "0")
    monkeypatch.setattr(shakespeare, "judge_whole", lambda logits, ids: 1.9)
    (tmp_path / "data/shakespeare_char").mkdir(parents=True)
    (tmp_path / "input.txt").write_text("To be, or not to be\n" * 100, encoding="utf-8")
    words = ["--nanogpt", str(tmp_path), "--text", str(tmp_path / "input.txt"), "--repeats", "2"]
    report = shakespeare.measure(shakespeare.read_options(words))
    trained = [command for command in commands if {"train", "train.py"} & set(command)]
    assert ["train.py" in command for command in trained] == [False, True, False, True]
    assert [command[command.index("--seed") + 1] for command in trained[::2]] == ["1337", "1338"]
    figures = ["40.0", "40.0", "40.0", "80.0", "8.0", "1.9000", "1.9000", "1.9000"]
    assert report.rows[1] == ["nanoGPT", *figures, "0.25 of its time"]


# ---------------------------------------------------------------- all together


def shown_commands(repository: Path) -> list[list[str]]:
    """The benchmark programs that `make benchmark` starts and the README shows, with their words."""
    variables = ["PEER=p", "NANOGPT=n", "LLMC=l", "BPE=b", "SHAKESPEARE=s"]
    making = ["make", "--dry-run", "--always-make", "benchmark", *variables]
    printed = subprocess.run(making, cwd=repository, capture_output=True, text=True, check=True).stdout
    readme = (repository / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = (printed + readme).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\S*/)?python benchmarks/", line.strip())]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_every_command_shown_has_options_that_its_program_knows(
    benchmarks: dict[str, Any], repository: Path
) -> None:
    commands = shown_commands(repository)
    for program, *words in commands:
        benchmarks[Path(program).stem].read_options(words)  # SystemExit if one is unknown
    shown = {Path(program).name for program, *_ in commands}
    assert {"train_step.py", "evaluate.py", "shakespeare.py", "startup.py", "prepare.py"} <= shown
