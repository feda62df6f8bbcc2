"""The programs of benchmarks/: each runs at its smallest, and what could make a figure wrong is checked."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overnight.conversion.huggingface import write_huggingface
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.planning.network import Collective, Link, ParallelLayout, collective_seconds
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.training import OptimizerConfig
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.state import TrainState

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=64)  # nothing to pad
SMALL_RECIPE = """
[data]
data = "shards"
[model]
n_layer = 1
n_head = 1
n_embd = 8
context_length = 16
[schedule]
total_steps = 6
[batch]
tokens_per_step = 64
[compute]
device = "cpu"
precision = "fp32"
compile = false
"""


def far_from_chance(config: ModelConfig = TINY, seed: int = 0) -> GPT:
    """A model whose losses differ from window to window."""
    model = GPT(config, seed=seed)
    for weight in model.parameters():
        weight.data.mul_(20.0)
    return model.eval()


# Every program, at its smallest

ONE_LAYER = "--layers 1 --repeats 1"
SMALLEST = {
    "bands": "--recipe small.toml --seeds 2 --evaluations 2 --write small.json",
    "communication": f"--processes 2 --largest 0.1 --channels 8 {ONE_LAYER}",
    "corpus": "--corpus corpus --bpe {data}/gpt2-bpe --repeats 1",
    "evaluate": f"--data shards --rows 2 --context 16 --batches 1 {ONE_LAYER}",
    "generate": f"--batch 1 --prompt 4 --new 4 --top-k 5 --sides overnight {ONE_LAYER}",
    "hellaswag": "--questions {data}/hellaswag/hellaswag_val_first2000.jsonl --count 2 --warm-ups 0 "
    f"--bpe {{data}}/gpt2-bpe {ONE_LAYER}",
    "memory": "--layers 1 --channels 16 --context 16 --vocabulary 64 --rows 1 --parts rotary",
    "plan": "small.toml --steps 6 --seconds 1",
    "prepare": "--tokenizer bpe-300 --repeats 1",
    "rounding": "model --text text/001.txt",
    "saving": "--repeats 1",
    "shakespeare": "--text {data}/shakespeare/input.txt --iterations 20 --repeats 1",
    "startup": "--repeats 1",
    "stream": "--small 3000 --large 100000 --context 16 --batches 2 --repeats 1",
    "train_step": "--data shards --sides overnight transformers-fp32 --rows 1 --micro-batches 1 "
    "--context 16 --layers 1 --steps 1 --warm-ups 2",
    "window": "--rows 1 --context 16 --window 4 --repeats 1",
}
QUICK = ("bands", "corpus", "hellaswag", "rounding", "stream")  # two seconds each


@pytest.fixture(scope="module")
def place(tmp_path_factory, prepare_texts):
    """A folder with a text, its shards, a recipe of them, a corpus of Parquet files, and a model."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("benchmarks")
    texts = [f"document {number} of {number * number}\n" * 5 for number in range(20)]
    shutil.move(prepare_texts(folder / "text", texts), folder / "shards")
    (folder / "small.toml").write_text(SMALL_RECIPE)
    (folder / "corpus").mkdir()
    rows = pyarrow.table({"text": [f"{n} {text}" for n in range(10) for text in texts]})
    parquet.write_table(rows, folder / "corpus" / "0.parquet")
    tokenizer = build_tokenizer("characters", texts)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    write_huggingface(far_from_chance(config), tokenizer, folder / "model")
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in SMALLEST]
)
def test_benchmark_runs(name, place, programs, repository, request, tmp_path, monkeypatch, capfd):
    """The quick ones here; the others, which may set this process's environment, in their own."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    words = SMALLEST[name]
    if "{data}" in words:
        words = words.format(data=request.getfixturevalue("shared_data"))
    command = [str(repository / "benchmarks" / f"{name}.py"), *words.split(), "--json"]
    if name in QUICK:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(command[0], run_name="__main__")
    else:
        subprocess.run([sys.executable, *command], check=True)
    report = json.loads(capfd.readouterr().out)
    assert report["measured"]
    assert not any("THE SIDES D" in note or "DO NOT JUDGE" in note for note in report["notes"])


def test_benchmark_refuses_bad_input(programs, tmp_path, capsys):
    train_step = programs["train_step"]
    options = train_step.read_options(["--peer", str(tmp_path)])
    assert programs["measure"].run_plainly(lambda: train_step.report(options), as_json=False) == 2
    error = capsys.readouterr().err
    assert "is not a checkout of build-nanogpt" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_commands_shown_have_known_options(programs, repository):
    """Those of `make benchmark`, which benchmarks/README.md lists, and of the documents."""
    variables = ["PEER=p", "NANOGPT=n", "LLMC=l", "BPE=b", "SHAKESPEARE=s"]
    making = ["make", "--dry-run", "--always-make", "benchmark", *variables]
    printed = subprocess.run(making, cwd=repository, capture_output=True, text=True, check=True).stdout
    readme = (repository / "benchmarks" / "README.md").read_text(encoding="utf-8")
    documents = "".join(path.read_text(encoding="utf-8") for path in (repository / "docs").glob("*.md"))
    lines = (printed + readme + documents).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python benchmarks/[^`]*)`", documents)
    found = [shlex.split(line)[1:] for line in lines if re.match(r"(\S*/)?python benchmarks/", line.strip())]
    for program, *words in found:
        programs[Path(program).stem].read_options(words)  # SystemExit if one is unknown
    with pytest.raises(SystemExit):  # the negative control
        programs["train_step"].read_options(["--no-such-option"])
    assert {"train_step", "evaluate", "prepare", "hellaswag"} <= {Path(program).stem for program, *_ in found}
    listed = readme[readme.index("One command runs ") : readme.index("make benchmark PEER=")]
    made = dict.fromkeys(re.findall(r"benchmarks/(\w+\.py)", printed))
    assert re.findall(r"`(\w+\.py)`", listed) == list(made)


# How sides are compared


def test_sides_take_turns_and_are_compared_round_by_round(programs):
    calls: list[str] = []

    def side(name: str) -> Any:
        return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

    measure = programs["measure"]
    results = measure.interleave({name: side(name) for name in "ABC"}, repeats=2, warm_ups=1)
    assert "".join(calls) == "ABCABCABC"
    assert results == {"A": [4, 7], "B": [5, 8], "C": [6, 9]}, "without the warm-ups"
    with pytest.raises(ValueError, match="at least 1"):
        measure.interleave({"A": int}, repeats=0)
    ours, theirs = [1.0, 10.0, 2.0], [2.0, 20.0, 20.0]  # the machine was slow in the second round
    assert measure.paired_ratio(ours, theirs) == 2.0  # the ratio of the medians would be 10
    assert measure.paired_ratio(theirs, theirs) == 1.0


def test_figures_replace_the_old_ones(programs, repository, tmp_path):
    measure, figures = programs["measure"], programs["figures"]
    report = measure.Report(title="T", headings=["what"], rows=[["new"]], measured={"a": [1.5]})
    report.save(tmp_path / "figures", "kills")
    document = tmp_path / "document.md"
    document.write_text("# Text\n\n<!-- figures: kills -->\n\nold\n\n<!-- end of figures -->\n\nmore\n")
    assert figures.main([str(document), str(tmp_path / "figures"), "--command", "make faults"]) == 0
    text = document.read_text()
    assert text.startswith("# Text\n\n<!-- figures: kills -->\n\n| what |")
    assert text.endswith("`make faults`.\n\n<!-- end of figures -->\n\nmore\n")
    assert "old" not in text
    assert report.date in text
    with pytest.raises(ValueError, match="no place for frozen"):
        figures.put(text, "frozen", "| 1 |")
    for name, parts in (("distributed", programs["distributed"].PARTS), ("reliability", ["kills", "leaks"])):
        page = (repository / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert all(figures.put(page, part, "") for part in parts)


def test_charts_of_a_page_become_files(programs):
    chart = (
        '<div class="chart wide" role="img" aria-label="Loss" tabindex="0"><svg width="1"><g/></svg></div>'
    )
    found = programs["charts"].read_charts(f"<p>{chart}</p><svg/>{chart}")
    assert len(found) == 2
    assert found[0].startswith("<svg style=")
    assert found[0].endswith('width="1"><g/></svg>\n')


# Both sides do the same work


def test_training_peers_have_equal_losses(programs, tmp_path):
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "ids.npy", torch.randint(64, (6 * 4 * 16 + 1,), generator=generator).numpy())
    settings = {"precision": "fp32", "compile": False, "device": "cpu", "rows": 2, "micro_batches": 2}
    settings |= {"checkout": None, "model": dataclasses.asdict(TINY), "folder": str(tmp_path)}
    ours = programs["sides"].Task(peer=None, **settings)
    peer = dataclasses.replace(ours, peer="transformers")
    losses = []
    for task in (ours, peer):
        turn, precision = programs["stepper"].build(task)
        assert precision == "fp32"
        losses.append([turn()["losses"][0] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[0][0] - losses[0][3]) > 1e-3  # so they agree on updates, too
    for change in ({"rows": 1}, {"micro_batches": 1}):  # negative control: other rows, other losses
        turn, _ = programs["stepper"].build(dataclasses.replace(peer, **change))
        assert abs(turn()["losses"][0] - losses[0][0]) > 1e-4


def test_different_work_is_reported(programs):
    train_step = programs["train_step"]
    options = train_step.read_options(["--rows", "1", "--micro-batches", "1"])
    about = {"precision": "bf16", "threads": 2}
    turn = {"milliseconds": 1.0, "peak_bytes": 2e9, "waited_seconds": 1.0, "waited_cpu_seconds": 0.01}
    for loss, is_equal in ((10.9, True), (11.0, False)):
        turns = {"a": [{**turn, "losses": [10.9]}] * 3, "b": [{**turn, "losses": [loss]}] * 3}
        measured = train_step.Measured(turns, {"a": about, "b": about}, {})
        notes = train_step.describe_figures(measured, "a", programs["measure"].gpt2_124m(), options)
        assert any("THE SIDES DO NOT DO THE SAME WORK" in note for note in notes) != is_equal


def test_evaluation_peers_agree(programs):
    evaluate, model = programs["evaluate"], far_from_chance()
    text = torch.randint(64, (6 * 16 + 1,), generator=torch.Generator().manual_seed(0))
    batch = evaluate.Rows(text.numpy(), 16).batch
    windows = [batch(number * 2, 2) for number in range(3)]
    question = evaluate.Question(batches=windows, precision="fp32", device="cpu")
    theirs = programs["peers"].build_peer("transformers", None, model)
    found = evaluate.evaluate_theirs(theirs, question)
    assert evaluate.evaluate_ours(model, question) == pytest.approx(found, abs=1e-4)
    fewer = dataclasses.replace(question, batches=windows[:2])
    assert abs(evaluate.evaluate_theirs(theirs, fewer) - found) > 0.01  # negative control: another text
    losses = {"overnight": 10.0, "nanoGPT": 10.001, evaluate.STRIDED: 9.0}
    assert "DO NOT JUDGE" not in evaluate.describe_losses(losses)[1]
    assert "DO NOT AGREE" in evaluate.describe_losses(losses | {"nanoGPT": 10.1})[1]


def test_generation_peers_write_the_same(programs):
    generate, ours = programs["generate"], far_from_chance()
    theirs = programs["peers"].build_transformers(ours).model.eval()
    prompts = generate.draw_prompts(3, 4, TINY.vocab_size)
    setting = generate.Setting(rows=3, new=8, top_k=None)
    written = generate.write_ours(ours, prompts, setting)
    assert [len(ids) for ids in written] == [8, 8, 8]
    assert written == generate.write_theirs(theirs, prompts, setting)
    with pytest.raises(AssertionError):  # negative control: fewer tokens than asked for
        generate.write(lambda *_: [[1], [2], [3]], prompts, setting)


def test_hellaswag_answers_are_compared_one_by_one(programs):
    hellaswag = programs["hellaswag"]
    answers = {hellaswag.OURS: [0, 1, 2], hellaswag.TRAINING: [0, 1, 3]}
    assert "THE SIDES DIFFER" in hellaswag.compare(answers, [3, 1, 0])[0]
    assert "DIFFER" not in hellaswag.compare({**answers, hellaswag.TRAINING: [0, 1, 2]}, [3, 1, 0])[0]


def test_rounding_of_the_same_model_costs_nothing(programs):
    model, another = far_from_chance(), far_from_chance(seed=1)
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    found = programs["rounding"].evaluate({"fp32": model, "again": model, "another": another}, ids)
    assert all(torch.equal(a, b) for a, b in zip(found["again"], found["fp32"], strict=True))
    assert all(float(part.mean()) > 0.01 for part in found["another"][1:])


def test_stream_peer_draws_batches_of_one_kind(programs, tmp_path):
    stream = programs["stream"]
    stream.write_shards(tmp_path / "small", 5000, shard_tokens=5000, empty=False)
    ids, targets = stream.draw_as_nanogpt(tmp_path / "small" / "train-00000.bin", 12, 64)
    assert ids.shape == targets.shape == (12, 64)
    assert ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])


# Bands, communication, several processes


def test_band_needs_one_recipe_and_two_seeds(programs, place, monkeypatch):
    monkeypatch.chdir(place)
    bands = programs["bands"]
    recipe = bands.load_recipe("small.toml")
    text = dict.fromkeys(bands.TEXT, "x") | {"train": (), "vocab_size": 4}
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout=0.1))
    with pytest.raises(ValueError, match="recipe"):
        bands.build_band("small", [bands.Run(1, recipe, text, {}), bands.Run(2, other, text, {})])
    with pytest.raises(ValueError, match="--seeds 1"):
        bands.record(bands.read_options(["--recipe", "small.toml", "--seeds", "1"]))


def test_communication_fit_finds_the_link(programs):
    program = programs["communication"]
    exact = Link(name="", bytes_per_second=2e9, message_seconds=0.0, start_seconds=1e-3, source="")
    there = ParallelLayout(processes_per_machine=4, within=exact)
    for kind in program.KINDS:
        sizes = (10**4, 10**6, 10**8)
        times = {size: collective_seconds(Collective(kind, "all", 1, size), there) for size in sizes}
        link = program.fit_link(kind, times, 4)
        assert link.bytes_per_second == pytest.approx(2e9)
        assert link.start_seconds == pytest.approx(1e-3)


def test_transfer_begins_when_the_last_process_arrives(programs):
    overheard = programs["overheard"]
    first = overheard.Step(10.0, [(0.0, 3.0, 100), (5.0, 8.0, 50)])
    second = overheard.Step(9.0, [(2.0, 2.5, 100), (5.0, 7.0, 50)])
    assert overheard.divide([first, second]) == (10.0, 1.0 + 3.0, (2.0 + 0.0) / 2, 150)


def test_runs_differ_by_all_but_the_clock(programs, tmp_path):
    def write(name: str, *, seed: int = 0, loss: float = 3.0, milliseconds: float = 5.0) -> str:
        directory = RunDirectory(tmp_path / name)
        model = far_from_chance(seed=seed)
        save_checkpoint(
            TrainState(model, build_optimizer(model, OptimizerConfig()), 1), directory.checkpoints
        )
        directory.append_metrics({"step": 1, "loss": loss, "milliseconds": milliseconds})
        return programs["distributed"].digest(directory.path)

    one = write("one")
    assert write("same", milliseconds=7.0) == one
    assert one not in {write("loss", loss=math.nextafter(3.0, 4.0)), write("weights", seed=1)}


@pytest.mark.distributed
def test_small_distributed_campaign(repository, tmp_path):
    """In real processes: two kills and a frozen one."""
    words = ["--parts", "kills", "frozen", "--kills", "2", "--frozen", "1", "--steps", "40", "--figures"]
    command = [sys.executable, str(repository / "benchmarks/distributed.py"), *words, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " 2/2 |" in (tmp_path / "kills.md").read_text()
    assert " 1/1 |" in (tmp_path / "frozen.md").read_text()
