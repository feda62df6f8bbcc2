"""The doctor finds what is wrong, names it, and passes what is sound."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import random
import shutil
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.cli import main
from overnight.config import to_toml
from overnight.data import DataConfig, loader
from overnight.data.shards import (
    HEADER_BYTES,
    SPLITS,
    load_prepared_tokenizer,
    read_manifest,
    write_manifest,
    write_split,
)
from overnight.data.token_reader import documents_of, shard_spans
from overnight.doctor import CHECKS, DATA_CHECKS, DoctorConfig, data_checks, step_checks
from overnight.doctor.check import CheckResult
from overnight.doctor.command import check_recipe, run
from overnight.doctor.context import DoctorContext
from overnight.model import gpt, loss
from overnight.recipe import Recipe
from overnight.tokenizer.characters import Characters
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training.checkpoint import save
from overnight.training.schedule import ScheduleConfig

SLOW = ("compiled", "processes", "time")
FAST = tuple(name for name in CHECKS if name not in SLOW)
BF16 = ComputeConfig(device="cpu", precision="bf16", compile=False)
Results = dict[str, CheckResult]
Check = Callable[..., Results]
Open = Callable[..., DoctorContext]
Sabotage = Callable[[Any], Any]
Patch = pytest.MonkeyPatch


@pytest.fixture
def open_context(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: Patch) -> Open:
    """Opens a small recipe with these changes, and options of the command."""
    monkeypatch.chdir(tmp_path)

    def open_context(options: dict[str, Any] | None = None, **changes: object) -> DoctorContext:
        (tmp_path / "scratch").mkdir()
        (tmp_path / "small.toml").write_text(to_toml(recipe(**changes)))
        config = DoctorConfig(**vars(recipe(**changes)), **(options or {}))
        return DoctorContext(config, "small.toml", tmp_path / "scratch")

    return open_context


@pytest.fixture
def check(open_context: Open) -> Check:
    """Does the checks of a small recipe, all but the slow ones unless they are named."""

    def check(*only: str, **changes: Any) -> Results:
        return {result.name: result for result in check_recipe(open_context(**changes), only or FAST)}

    return check


def failed(found: Results) -> set[str]:
    return {name for name, result in found.items() if result.passed is False}


def cause(found: Results, name: str) -> str:
    assert found[name].passed is False, found[name]
    return found[name].cause


# Sound recipes.


def test_doctor_passes_a_sound_recipe(
    open_context: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checks but compilation; and random state, threads and files are as before.

    Not through the command line: tyro, which parses it, draws from Python's random state.
    """
    config = open_context(compute=BF16).config
    benchmark = tmp_path / "elsewhere.txt"
    benchmark.write_text("thirteen words in a row that surely nobody has written before in any text")
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state(), torch.get_num_threads()
    files = {*tmp_path.rglob("*")}
    longer = ScheduleConfig(total_steps=20, warmup_steps=3)
    config = dataclasses.replace(config, schedule=longer, benchmarks=(str(benchmark),))
    assert run(config, "small.toml") == 0
    captured = capsys.readouterr()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == before[2]
    assert {*tmp_path.rglob("*")} == files
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(len(line) <= 80 for line in lines)
    marks = {words[1]: words[0] for line in lines if len(words := line.split()) > 1}
    assert {name for name in CHECKS if marks[name] == "-"} == {"compiled", "reference"}
    assert {name for name in CHECKS if marks[name] == "ok"} == {*CHECKS} - {"compiled", "reference"}
    assert any("<|endoftext|>" in line for line in lines)
    assert any("▁" in line or "█" in line for line in lines)
    assert lines[-1] == "next: overnight train small.toml --total-steps 20"


def test_json_has_the_chosen_checks(open_context: Open, capsys: pytest.CaptureFixture[str]) -> None:
    open_context()  # writes small.toml
    words = ["--only", "gradients", "learning-rate", "precision", "--peak-learning-rate=7", "--json"]
    assert main(["doctor", "small.toml", *words]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    results = {result["name"]: result["passed"] for result in found["checks"]}
    assert results == {"gradients": True, "precision": None, "learning-rate": False}
    assert found["checks"][-1]["figures"]["peak"] == 7
    assert captured.err.endswith("overnight doctor small.toml --peak-learning-rate 7.0\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_step_is_compared(check: Check) -> None:
    found = check("compiled", compute=ComputeConfig(device="cpu", precision="fp32", compile=True))
    assert found["compiled"].passed, found["compiled"].cause


# Sabotaged code: functions from the code to what takes its place.


def then(change: Callable[..., object]) -> Sabotage:
    """Calls the code, and then `change` with its result and its arguments."""

    def sabotage(code: Any) -> Any:
        def sabotaged(*given: Any) -> Any:
            result = code(*given)
            change(result, *given)
            return result

        return sabotaged

    return sabotage


def freeze_a_parameter(model: gpt.GPT, *_given: Any) -> None:
    model.h[1].ln_2.bias.requires_grad = False


def forget_a_parameter(optimizer: torch.optim.AdamW, *_given: Any) -> None:
    del optimizer.param_groups[0]["params"][0]


def forget_the_step(_: None, state: Any, *_given: Any) -> None:
    state.step = 0


def divide_again(_: Tensor, sharing: Any, _nats: Tensor, number: int, count: int) -> None:
    for parameter in sharing.parameters if number == count - 1 else ():
        parameter.grad /= count


def multiply_again(_: Tensor, sharing: Any, _nats: Tensor, number: int, count: int) -> None:
    for parameter in sharing.parameters if number == count - 1 else ():
        parameter.grad *= count


def detach_attention(_forward: Any) -> Any:
    def forward(block: Any, x: Tensor, cache: Any = None, document: Any = None) -> Tensor:
        x = x + block.attn(block.ln_1(x), cache, document).detach()
        return x + block.mlp(block.ln_2(x))

    return forward


def let_the_future_through(attend: Any) -> Any:
    return lambda *given, **options: attend(*given, **{**options, "is_causal": False})


def save_in_bfloat16(copy: Any) -> Any:
    return lambda *given: {
        name: piece._replace(rows=piece.rows.bfloat16().float()) for name, piece in copy(*given).items()
    }


def update_nothing(step_if: Any) -> Any:
    return lambda *given: step_if(*given[:-1], 0.0)


def shift_positions(positions: Any) -> Any:
    return lambda cache, length: (positions(cache, length) - 1).clamp(min=0)


def decay_too_slowly(multiplier: Any) -> Any:
    return lambda position, length, config: multiplier(position, 10 * length, config)


def predict_the_same_id(batch: Any) -> Any:
    return lambda *given: loader.Batch(batch(*given).ids, batch(*given).ids)


FREEZE = ("run.setup.build_sharded_model", then(freeze_a_parameter))
FULL_DISK = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
REDUCE = "training.sharding.Replicated.reduce"
SABOTAGES: list[tuple[str, Sabotage, str, str]] = [
    ("model.gpt.STANDARD_DEVIATION", lambda _: 0.2, "initial-loss", "standard deviation"),
    (*FREEZE, "gradients", "h.1.ln_2.bias gets no gradient"),
    ("model.gpt.Block.forward", detach_attention, "gradients", "detach()"),
    ("run.setup.build_sharded_optimizer", then(forget_a_parameter), "gradients", "wte.weight is in no"),
    ("model.gpt.F.scaled_dot_product_attention", let_the_future_through, "causality", "attention mask"),
    (REDUCE, then(divide_again), "accumulation", "gradient is 0.25 times"),
    (REDUCE, then(multiply_again), "accumulation", "gradient is 4 times"),
    (REDUCE, lambda _: lambda self, nats, number, count: nats, "accumulation", "(loss differs"),
    ("training.step.step_if", update_nothing, "overfit", "optimizer"),
    ("generation.generate.KVCache.positions", shift_positions, "generation", "position is off by one"),
    ("training.checkpoint.save._moments", lambda _: lambda *given: {}, "checkpoint", "lost AdamW's exp_avg"),
    ("training.checkpoint.save._copy", save_in_bfloat16, "checkpoint", "weights wte.weight differ by"),
    (
        "training.checkpoint.load.load_checkpoint",
        then(forget_the_step),
        "checkpoint",
        "step is 0 instead of 2",
    ),
    ("data.loader.TokenStream.batch", predict_the_same_id, "rows", "targets are not the next ids"),
    ("training.schedule.learning_rate_multiplier", decay_too_slowly, "schedule", "decay"),
    ("planning.command.shutil", lambda _: FULL_DISK, "disk", "disk"),
    ("planning.command.find_memory_bytes", lambda _: lambda device: 100_000, "memory", "memory"),
]


def sabotage(patch: Patch, target: str, change: Sabotage) -> None:
    patch.setattr(f"overnight.{target}", change(pkgutil.resolve_name(f"overnight.{target}")))


@pytest.mark.parametrize("target, change, name, words", SABOTAGES)
def test_sabotaged_code_is_found(
    target: str, change: Sabotage, name: str, words: str, check: Check, monkeypatch: Patch
) -> None:
    sabotage(monkeypatch, target, change)
    found = check()
    assert words in cause(found, name)
    # Without a cache the future is visible, with one it is not; and the same id is easy to predict.
    also = {"causality": {"generation"}, "rows": {"initial-loss"}}.get(name, set())
    assert failed(found) - also == {name}


def test_checks_that_need_gradients_are_skipped_without(check: Check, monkeypatch: Patch) -> None:
    sabotage(monkeypatch, *FREEZE)
    found = check("gradients", "overfit", "accumulation")
    for name in ("overfit", "accumulation"):
        assert found[name].passed is None
        assert "gradients" in found[name].cause


@pytest.mark.parametrize("factor, passed", [(1.001, False), (1.0, True)])
def test_compiled_code_that_differs_is_found(
    check: Check, monkeypatch: Patch, factor: float, passed: bool
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda nats, **how: lambda ids, targets: nats(ids, targets) * factor
    )
    monkeypatch.setattr(step_checks, "can_compile", lambda: True)
    monkeypatch.setattr("overnight.training.compute.can_compile", lambda: True)
    found = check("compiled", compute=ComputeConfig(device="cpu", precision="fp32"))
    assert found["compiled"].passed is passed
    assert "torch.compile" in found["compiled"].cause


def test_precision_that_rounds_the_loss_is_found(check: Check, monkeypatch: Patch) -> None:
    def rounded(logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        if logits.dtype != torch.bfloat16:
            return each.sum()
        return reduce(torch.add, each.bfloat16()).float()

    monkeypatch.setattr(loss, "cross_entropy_nats", rounded)
    found = check("precision", "initial-loss", compute=BF16)
    assert failed(found) == {"precision"}
    assert "bf16" in cause(found, "precision")


def test_gradients_not_summed_over_processes_are_found(
    check: Check, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The sabotage is where each Python looks when it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "from overnight.distributed.world import World\nWorld.all_reduce = lambda self, tensors: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    found = check("processes")
    assert "SUMMED over processes" in cause(found, "processes")


def test_check_that_raises_does_not_stop_the_others(check: Check, monkeypatch: Patch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("the disk said no\nand no again")

    monkeypatch.setattr(save, "save_checkpoint", fail)
    found = check("generation", "checkpoint", "learning-rate")
    assert failed(found) == {"checkpoint"}
    assert cause(found, "checkpoint").endswith("the disk said no and no again")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_tiny_run_reads_the_recipe_s_text_if_it_can(
    is_damaged: bool, open_context: Open, prepared: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "copy")
    if is_damaged:
        shutil.rmtree(folder / "tokenizer")
    tiny = open_context(data=DataConfig(data=str(folder))).tiny_run
    assert ("made-up text" in tiny.reductions) is is_damaged
    text = tiny.build().dataset.tokenizer.decode(tiny.build().training.data.batch(0, 2).ids[0].tolist())
    assert ("small text" in text) is not is_damaged


# Recipes.


@pytest.mark.parametrize(
    "changes, name, words",
    [
        ({"optimizer": OptimizerConfig(peak_learning_rate=1.0)}, "learning-rate", "diverges"),
        ({"optimizer": OptimizerConfig(peak_learning_rate=1e-4)}, "learning-rate", "hardly"),
        ({"schedule": ScheduleConfig(total_steps=12)}, "schedule", "warm-up"),
    ],
)
def test_unlikely_setting_is_found(changes: Any, name: str, words: str, check: Check) -> None:
    found = check(**changes)
    assert failed(found) == {name}
    assert words in cause(found, name)


# Damaged text.


def rewrite(folder: Path, out: Path, change: Callable[[Any], Any] = np.copy, shared: int = 0) -> Path:
    """The documents of a prepared folder, each changed, with a manifest that matches them."""
    manifest = read_manifest(folder)
    train, validation = (
        [
            change(np.concatenate(pieces))
            for pieces in documents_of(shard_spans(folder, manifest, split, None))
        ]
        for split in SPLITS
    )
    train += validation[:shared]
    out.mkdir()
    shards = {}
    for split, documents in zip(SPLITS, (train, validation), strict=True):
        written = [(ids, ids.size) for ids in documents]
        shards[split] = write_split(out, split, written, manifest.vocab_size, 1500)
    shutil.copytree(folder / "tokenizer", out / "tokenizer")
    write_manifest(out, dataclasses.replace(manifest, documents=len(train) + len(validation), **shards))
    return out


def double_separator(ids: Any) -> Any:
    return np.concatenate([ids[:1], ids])


def shift_ids(ids: Any) -> Any:
    """Other ids, as if another tokenizer had written them."""
    return np.concatenate([ids[:1], (ids[1:] + 200) % 256])


def flip_a_bit(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    content = bytearray((out / "train-00000.bin").read_bytes())
    content[HEADER_BYTES + 200] ^= 1
    (out / "train-00000.bin").write_bytes(content)
    return out


def exchange_tokenizer(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    shutil.rmtree(out / "tokenizer")
    Characters("abcdefghijklm").save(out / "tokenizer")
    return out


@pytest.mark.parametrize(
    "damage, names, words",
    [
        (rewrite, set(), ""),  # the negative control
        (partial(rewrite, change=lambda ids: ids[1:]), {"boundaries"}, "has 0 end-of-text ids for its"),
        (partial(rewrite, change=lambda ids: np.roll(ids, -1)), {"boundaries"}, "does not begin with"),
        (partial(rewrite, change=double_separator), {"boundaries"}, "two end-of-text ids in a row"),
        (partial(rewrite, shared=1), {"disjoint"}, "1 held-out documents are in the training"),
        (partial(rewrite, change=shift_ids), {"tokenizer"}, "written with another one"),
        (exchange_tokenizer, {"tokenizer"}, "tokenizer"),
        (flip_a_bit, {"shards"}, "train-00000.bin"),
    ],
)
def test_damaged_text_is_found(
    damage: Callable[[Path, Path], Path],
    names: set[str],
    words: str,
    check: Check,
    prepared: Path,
    tmp_path: Path,
) -> None:
    found = check(*DATA_CHECKS, data=DataConfig(data=str(damage(prepared, tmp_path / "damaged"))))
    assert failed(found) == names
    assert all(words in found[name].cause for name in names)


@pytest.mark.parametrize("full", [False, True])
def test_long_text_is_sampled_unless_full(full: bool, check: Check, monkeypatch: Patch) -> None:
    monkeypatch.setattr(data_checks, "READ_TOKENS", 2000)
    found = check(*DATA_CHECKS, options={"full": full})
    assert failed(found) == set()
    assert (" of " in found["shards"].measured) is not full
    assert (found["disjoint"].figures["train_documents"] < 20) is not full


@pytest.mark.parametrize("full", [False, True])
def test_contaminated_text_is_found(full: bool, check: Check, prepared: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared)
    tokenizer = load_prepared_tokenizer(prepared)
    ids = np.concatenate(next(documents_of(shard_spans(prepared, manifest, "train", 1))))
    benchmark = tmp_path / "exam.jsonl"
    benchmark.write_text(json.dumps({"question": tokenizer.decode(ids.tolist())}) + "\n")
    found = check(*("contamination", "shards"), options={"benchmarks": (str(benchmark),), "full": full})
    assert failed(found) == {"contamination"}
    assert "with exam)" in cause(found, "contamination")


def test_missing_text_is_reported_with_its_command(check: Check, recipe: Callable[..., Recipe]) -> None:
    """The model is tried all the same, on made-up text."""
    found = check(
        *("shards", "boundaries", "initial-loss", "gradients"),
        data=DataConfig(data="data/fineweb-edu"),
        model=dataclasses.replace(recipe().model, vocab_size=300),
    )
    assert found["shards"].passed is None
    assert "overnight prepare fineweb-edu" in found["shards"].cause
    assert found["boundaries"].passed is None
    assert found["initial-loss"].passed
    assert found["gradients"].passed


def test_small_text_is_prepared(check: Check, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(f"Paragraph {n} says {n}." for n in range(3000)))
    found = check(
        *("shards", "tokenizer", "boundaries"),
        data=DataConfig(data="notes.txt", tokenizer="bpe-300", validation_fraction=0.3),
    )
    assert failed(found) == set()
    assert found["shards"].passed
    assert (tmp_path / "data" / "notes-bpe-300" / "manifest.json").is_file()


# Wrong use.


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--baseline", "no-such-model"), "no-such-model"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--n-head", "3"), "n_head=3"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: tuple[str, str], complaint: str, open_context: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    open_context()  # writes small.toml
    assert main(["doctor", "small.toml", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not Path("runs").exists()
