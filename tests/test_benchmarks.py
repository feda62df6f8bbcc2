"""What could make a benchmark lie: the order of the sides, the ratios, what is taken from the peer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from overnight.model.config import ModelConfig
from overnight.model.gpt import GPT
from overnight.model.initialization import initialize

MODULES = ("measure", "peer", "stepper", "sides", "text", "train_step", "generate", "startup", "prepare")
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=40)

CHECKOUT = """
import math
from dataclasses import dataclass
from hellaswag import render_example
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 4
    vocab_size: int = 3

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.width = math.sqrt(config.block_size)

    def configure_optimizers(self):
        return "printed" if master_process else "silent"

raise SystemExit("the program runs")
"""


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Every module of benchmarks/ by its name, imported as a program started there would."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in (*MODULES, "build_nanogpt"):
        sys.modules.pop(name, None)


@pytest.fixture
def measure(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["measure"]


@pytest.fixture
def peer(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["peer"]


def checkout(folder: Path, program: str = CHECKOUT) -> Path:
    (folder / "train_gpt2.py").write_text(program, encoding="utf-8")
    return folder


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


# ---------------------------------------------------------------- the peer


def test_of_the_peer_s_program_only_the_definitions_are_taken(peer: Any, tmp_path: Path) -> None:
    module = peer.load_definitions(checkout(tmp_path))  # its `raise SystemExit` is not reached
    model = module.GPT(module.GPTConfig())
    assert model.width == 2.0  # its own imports are there
    assert model.configure_optimizers() == "silent"
    assert "hellaswag" not in sys.modules
    assert not hasattr(module, "render_example")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "there is no train_gpt2.py in it"),
        ("class GPT: ...", "does not define GPTConfig"),
        ("x = 1", "does not define GPT and GPTConfig"),
        ("def (", "is not Python"),
    ],
)
def test_another_folder_is_refused_in_one_sentence_with_status_2(
    benchmarks: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str | None,
    reason: str,
) -> None:
    if program is not None:
        checkout(tmp_path, program)
    train_step = benchmarks["train_step"]
    options = train_step.read_options(["--peer", str(tmp_path)])
    assert benchmarks["measure"].run_plainly(lambda: train_step.measure(options), as_json=False) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"benchmark: {tmp_path} is not a checkout of build-nanogpt: ")
    assert reason in said
    assert said.count("\n") == 1


def test_the_peer_begins_with_our_weights_but_for_its_padding(peer: Any) -> None:
    model = GPT(TINY)
    initialize(model, seed=0)
    ours = model.weights()
    theirs = nn.ModuleDict({"transformer": GPT(dataclasses.replace(TINY, vocab_size=64))})
    for weight in theirs.parameters():
        nn.init.constant_(weight, 7.0)
    peer.copy_weights(ours, theirs)
    copied = dict(theirs.named_parameters())
    assert all(torch.equal(copied[f"transformer.{name}"][: len(ours[name])], ours[name]) for name in ours)
    assert (copied["transformer.wte.weight"][TINY.vocab_size :] == 7.0).all()
    with pytest.raises(AssertionError, match=r"ln_f\.bias"):
        peer.copy_weights({name: ours[name] for name in ours if name != "ln_f.bias"}, theirs)


# A program whose model is ours under the peer's names, and whose optimizer is written out.
SAME_MODEL = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
import overnight.model.gpt
from overnight.model.config import ModelConfig

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = dict(vars(config))
        self.transformer = overnight.model.gpt.GPT(
            ModelConfig(context_length=sizes.pop("block_size"), **sizes)
        )

    def forward(self, ids, targets):
        logits = self.transformer(ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        kinds = [[w for w in self.parameters() if (w.dim() >= 2) == decays] for decays in (True, False)]
        groups = [{"params": kinds[0], "weight_decay": weight_decay}, {"params": kinds[1], "weight_decay": 0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
"""


def test_a_peer_with_our_model_has_our_losses(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.randint(64, (4 * 2 * 16 + 1,), generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "ids.npy", ids)
    model = dataclasses.asdict(dataclasses.replace(TINY, vocab_size=64))  # nothing to pad
    ours = benchmarks["stepper"].Task(
        peer=None, precision="fp32", compile=False, model=model, rows=2, ids=str(tmp_path / "ids.npy")
    )
    theirs = dataclasses.replace(ours, peer=str(checkout(tmp_path, SAME_MODEL)))
    losses = []
    for task in (ours, theirs):
        step, precision = benchmarks["stepper"].build(task)
        assert precision == "fp32"
        losses.append([step() for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0][0] - losses[0][3]) > 1e-3  # so the agreement is about updates, too


# ---------------------------------------------------------------- sides


def chosen(sides: ModuleType, names: list[str] | None = None, **found: bool) -> list[str]:
    everything = {"peer": True, "compiler": True, "glibc": True, "bf16": True}
    return [side.name for side in sides.choose_sides(names, sides.Circumstances(**everything | found))[0]]


def test_sides_that_can_t_run_are_left_out_and_it_is_said_why(benchmarks: dict[str, Any]) -> None:
    sides = benchmarks["sides"]
    assert chosen(sides) == [side.name for side in sides.SIDES.values()]
    assert not any("nanogpt" in name for name in chosen(sides, peer=False))
    assert not any("compiled" in name for name in chosen(sides, compiler=False))
    assert "overnight, large pages" in chosen(sides, compiler=False)
    assert "overnight, large pages" not in chosen(sides, glibc=False)
    assert not any("bf16" in name for name in chosen(sides, bf16=False))
    circumstances = sides.Circumstances(peer=True, compiler=True, glibc=True, bf16=False)
    _, left_out = sides.choose_sides(None, circumstances)
    assert left_out[0].startswith("build-nanogpt, bf16 as published is left out: this CPU only emulates")


def test_a_named_side_runs_or_is_refused(benchmarks: dict[str, Any]) -> None:
    sides = benchmarks["sides"]
    assert chosen(sides, ["peer", "overnight"], bf16=False) == [
        "build-nanogpt, bf16 as published",
        "overnight, eager",
    ]
    with pytest.raises(ValueError, match="the side peer can't run: --peer names no checkout"):
        chosen(sides, ["peer"], peer=False)


def test_a_process_steps_when_told_with_its_own_environment_and_waits_idly(
    benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, stepper = benchmarks["sides"], benchmarks["stepper"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    ids = np.resize(np.arange(TINY.vocab_size or 0, dtype=np.uint16), 3 * 2 * 16 + 1)
    np.save(tmp_path / "ids.npy", ids)
    task = stepper.Task(
        peer=None,
        precision="fp32",
        compile=False,
        model=dataclasses.asdict(TINY),
        rows=2,
        ids=str(tmp_path / "ids.npy"),
    )
    with sides.at_work(
        [sides.SIDES["overnight"], sides.SIDES["overnight-large-pages"]], lambda _: task
    ) as two:
        assert [process.about["precision"] for process in two] == ["fp32", "fp32"]
        environments = [read_environment(process) for process in two]
        answers = [[process.step() for process in two] for _ in range(3)]
    assert "GLIBC_TUNABLES" not in environments[0]
    assert "hugetlb=1" in environments[1]["GLIBC_TUNABLES"]
    losses = [[each["loss"] for each in step] for step in answers]
    assert losses[0][0] == pytest.approx(math.log(TINY.vocab_size or 0), abs=0.05)
    assert losses[2][0] < losses[0][0]
    assert all(one == other for one, other in losses)
    waited = [answers[2][0][name] for name in ("waited_seconds", "waited_cpu_seconds")]
    assert waited[1] < 0.5 * waited[0] + 0.01


def read_environment(process: Any) -> dict[str, str]:
    """What the kernel gave a process; {} where it does not tell."""
    path = Path(f"/proc/{process._process.pid}/environ")
    if not path.is_file():
        pytest.skip("this system does not show a process's environment")
    pairs = path.read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_rows_lie_end_to_end(benchmarks: dict[str, Any]) -> None:
    batches = benchmarks["stepper"].read_rows(np.arange(17, dtype=np.uint16), context_length=4)
    batch = batches(2, 2)
    assert batch.ids.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert batch.targets.tolist() == [[9, 10, 11, 12], [13, 14, 15, 16]]
    with pytest.raises(AssertionError, match="too short"):
        batches(3, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--warm-ups", "1"], "--warm-ups 1 is too few; give at least 2"),
        (["--rows", "0"], "--rows 0 is too few"),
        (["--layers", "0"], "n_layer=0 must be at least 1"),
        (["--rows", "9999"], "choose some with --sides, or fewer --rows"),
        (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
        ([], "name with --bpe a folder"),  # the tests' cache is empty
    ],
)
def test_what_can_t_be_measured_is_refused(
    benchmarks: dict[str, Any], words: list[str], sentence: str
) -> None:
    train_step = benchmarks["train_step"]
    with pytest.raises(ValueError, match=sentence):
        train_step.measure(train_step.read_options([*words, "--sides", "overnight"]))


# ---------------------------------------------------------------- the other questions


def test_the_runs_that_are_measured_are_runs(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    from overnight.report.status import list_runs

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
