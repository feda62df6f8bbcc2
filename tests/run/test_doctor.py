"""The doctor finds what is wrong, names it, and passes what is sound."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
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
    ShardWriter,
    load_prepared_tokenizer,
    read_manifest,
    write_manifest,
)
from overnight.doctor import CHECKS, DATA_CHECKS, DoctorConfig, model_checks
from overnight.doctor import context as context_module
from overnight.doctor.check import CheckResult
from overnight.doctor.command import run, run_checks
from overnight.doctor.context import DoctorContext
from overnight.generation import generate
from overnight.inspection.statistics import documents_of, shard_spans
from overnight.model import gpt, loss
from overnight.planning import command as planning_command
from overnight.recipe import Recipe
from overnight.run import setup
from overnight.tokenizer.characters import Characters
from overnight.training import ComputeConfig, OptimizerConfig, schedule, sharding, step
from overnight.training.checkpoint import load as load_module
from overnight.training.checkpoint import save
from overnight.training.schedule import ScheduleConfig

SLOW = ("compiled", "processes", "time")
FAST = tuple(name for name in CHECKS if name not in SLOW)
BF16 = ComputeConfig(device="cpu", precision="bf16", compile=False)
Results = dict[str, CheckResult]
Check = Callable[..., Results]
Patch = pytest.MonkeyPatch


@pytest.fixture
def check(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: Patch) -> Check:
    """Does the checks of a small recipe, all but the slow ones unless they are named."""
    monkeypatch.chdir(tmp_path)

    def check(*only: str, options: dict[str, Any] | None = None, **changes: object) -> Results:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        (tmp_path / "small.toml").write_text(to_toml(recipe(**changes)))
        config = DoctorConfig(**vars(recipe(**changes)), **(options or {}))
        context = DoctorContext(config, "small.toml", scratch)
        return {result.name: result for result in run_checks(context, only or FAST)}

    return check


def failed(found: Results) -> set[str]:
    return {name for name, result in found.items() if result.passed is False}


def cause(found: Results, name: str) -> str:
    assert found[name].passed is False, found[name]
    return found[name].cause


# Sound recipes.


def test_doctor_passes_a_sound_recipe(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All checks but compilation; and random state, threads and files are as before.

    Not through the command line: tyro, which parses it, draws from Python's random state.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(to_toml(recipe(compute=BF16)))
    benchmark = tmp_path / "elsewhere.txt"
    benchmark.write_text("thirteen words in a row that surely nobody has written before in any text")
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state(), torch.get_num_threads()
    files = {*tmp_path.rglob("*")}
    longer = recipe(compute=BF16, schedule=ScheduleConfig(total_steps=20, warmup_steps=3))
    assert run(DoctorConfig(**vars(longer), benchmarks=(str(benchmark),)), "small.toml") == 0
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


def test_json_has_every_figure(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    words = ["--only", "gradients", "learning-rate", "precision", "--peak-learning-rate=7", "--json"]
    assert main(["doctor", "small.toml", *words]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"] is False
    assert found["recipe"] == "small.toml"
    results = {result["name"]: result["passed"] for result in found["checks"]}
    assert results == {"gradients": True, "precision": None, "learning-rate": False}
    (rate,) = (result for result in found["checks"] if result["name"] == "learning-rate")
    assert rate["figures"]["peak"] == 7
    assert "peak_learning_rate" in rate["cause"]
    assert captured.err.splitlines()[-1].endswith(
        "learning-rate, then: overnight doctor small.toml --peak-learning-rate 7.0"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_step_is_compared(check: Check) -> None:
    found = check("compiled", compute=ComputeConfig(device="cpu", precision="fp32", compile=True))
    assert found["compiled"].passed, found["compiled"].cause


# Sabotaged code.


def initialize_ten_times_too_wide(patch: Patch) -> None:
    patch.setattr(gpt, "STANDARD_DEVIATION", 0.2)


def freeze_a_parameter(patch: Patch) -> None:
    build = setup.build_sharded_model

    def build_frozen(*given: Any) -> gpt.GPT:
        model = build(*given)
        model.h[1].ln_2.bias.requires_grad = False
        return model

    patch.setattr(setup, "build_sharded_model", build_frozen)


def detach_attention(patch: Patch) -> None:
    def forward(self: Any, x: Tensor, cache: Any = None, document: Any = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, document).detach()
        return x + self.mlp(self.ln_2(x))

    patch.setattr(gpt.Block, "forward", forward)


def forget_a_parameter_in_the_optimizer(patch: Patch) -> None:
    build = setup.build_sharded_optimizer

    def build_forgetful(*given: Any) -> torch.optim.AdamW:
        optimizer = build(*given)
        del optimizer.param_groups[0]["params"][0]
        return optimizer

    patch.setattr(setup, "build_sharded_optimizer", build_forgetful)


def let_the_future_through(patch: Patch) -> None:
    attend = F.scaled_dot_product_attention

    def attend_to_all(*given: Any, is_causal: bool = False, **how: Any) -> Tensor:
        return attend(*given, **how)

    patch.setattr(F, "scaled_dot_product_attention", attend_to_all)


def scale_gradients(patch: Patch, factor: Callable[[int], float]) -> None:
    reduce = sharding.Replicated.reduce

    def reduce_scaled(self: sharding.Replicated, nats: Tensor, number: int, count: int) -> Tensor:
        total = reduce(self, nats, number, count)
        for parameter in self.parameters if number == count - 1 else ():
            parameter.grad *= factor(count)
        return total

    patch.setattr(sharding.Replicated, "reduce", reduce_scaled)


def average_averages(patch: Patch) -> None:
    scale_gradients(patch, lambda count: 1 / count)


def forget_to_divide(patch: Patch) -> None:
    scale_gradients(patch, lambda count: count)


def log_the_last_micro_batch(patch: Patch) -> None:
    patch.setattr(sharding.Replicated, "reduce", lambda self, nats, number, count: nats)


def update_nothing(patch: Patch) -> None:
    step_if = step.step_if
    patch.setattr(step, "step_if", lambda *given: step_if(*given[:-1], 0.0))


def shift_cached_positions(patch: Patch) -> None:
    positions = generate.KVCache.positions
    patch.setattr(
        generate.KVCache, "positions", lambda self, length: (positions(self, length) - 1).clamp(min=0)
    )


def lose_the_moments(patch: Patch) -> None:
    patch.setattr(save, "_moments", lambda state, parameters: iter(()))


def save_in_bfloat16(patch: Patch) -> None:
    weights = save._weights

    def rounded(state: Any, parameters: Any) -> Iterator[tuple[str, Any]]:
        for name, piece in weights(state, parameters):
            yield name, piece._replace(rows=piece.rows.bfloat16().float())

    patch.setattr(save, "_weights", rounded)


def forget_the_step(patch: Patch) -> None:
    load = load_module.load_checkpoint

    def load_without(state: Any, *given: Any) -> None:
        load(state, *given)
        state.step = 0

    patch.setattr(load_module, "load_checkpoint", load_without)


def predict_the_same_id(patch: Patch) -> None:
    batch = loader.TokenStream.batch

    def unshifted(self: Any, first_row: int, rows: int) -> loader.Batch:
        found = batch(self, first_row, rows)
        return loader.Batch(found.ids, found.ids)

    patch.setattr(loader.TokenStream, "batch", unshifted)


def decay_ten_times_too_slowly(patch: Patch) -> None:
    multiplier = schedule.learning_rate_multiplier
    patch.setattr(
        schedule,
        "learning_rate_multiplier",
        lambda position, length, config: multiplier(position, 10 * length, config),
    )


def fill_the_disk(patch: Patch) -> None:
    full = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))
    patch.setattr(planning_command, "shutil", full)


def take_the_memory_away(patch: Patch) -> None:
    patch.setattr(planning_command, "find_memory_bytes", lambda device: 100_000)


@pytest.mark.parametrize(
    "sabotage, name, words",
    [
        (initialize_ten_times_too_wide, "initial-loss", "standard deviation"),
        (freeze_a_parameter, "gradients", "h.1.ln_2.bias gets no gradient"),
        (detach_attention, "gradients", "detach()"),
        (forget_a_parameter_in_the_optimizer, "gradients", "wte.weight is in no parameter group"),
        (let_the_future_through, "causality", "attention mask"),
        (average_averages, "accumulation", "gradient differs, its gradient is 0.25 times"),
        (forget_to_divide, "accumulation", "gradient differs, its gradient is 4 times"),
        (log_the_last_micro_batch, "accumulation", "(loss differs"),
        (update_nothing, "overfit", "optimizer"),
        (shift_cached_positions, "generation", "position is off by one"),
        (lose_the_moments, "checkpoint", "wte.weight has lost AdamW's exp_avg"),
        (save_in_bfloat16, "checkpoint", "the weights wte.weight differ by"),
        (forget_the_step, "checkpoint", "the step is 0 instead of 2"),
        (predict_the_same_id, "rows", "targets are not the next ids"),
        (decay_ten_times_too_slowly, "schedule", "decay"),
        (fill_the_disk, "disk", "disk"),
        (take_the_memory_away, "memory", "memory"),
    ],
)
def test_sabotaged_code_is_found(
    sabotage: Callable[[Patch], None], name: str, words: str, check: Check, monkeypatch: Patch
) -> None:
    sabotage(monkeypatch)
    found = check()
    assert words in cause(found, name)
    # Without a cache the future is visible, with one it is not; and the same id is easy to predict.
    also = {"causality": {"generation"}, "rows": {"initial-loss"}}.get(name, set())
    assert failed(found) - also == {name}


def test_checks_that_need_gradients_are_skipped_without(check: Check, monkeypatch: Patch) -> None:
    freeze_a_parameter(monkeypatch)
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
    monkeypatch.setattr(context_module, "can_compile", lambda: True)
    monkeypatch.setattr("overnight.training.compute.can_compile", lambda: True)
    found = check("compiled", compute=ComputeConfig(device="cpu", precision="fp32"))
    assert found["compiled"].passed is passed
    assert "torch.compile" in found["compiled"].cause


def test_precision_that_rounds_the_loss_is_found(check: Check, monkeypatch: Patch) -> None:
    def rounded(logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        if logits.dtype != torch.bfloat16:
            return each.sum()
        return functools.reduce(torch.add, each.bfloat16()).float()

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

    monkeypatch.setattr(model_checks, "check_saving", fail)
    found = check("generation", "checkpoint", "learning-rate")
    assert failed(found) == {"checkpoint"}
    assert cause(found, "checkpoint").endswith("the disk said no and no again")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_tiny_run_reads_the_recipe_s_text_if_it_can(
    is_damaged: bool, recipe: Callable[..., Recipe], prepared: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    if is_damaged:
        shutil.rmtree(folder / "tokenizer")
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    config = DoctorConfig(**vars(recipe(data=DataConfig(data=str(folder)))))
    tiny = DoctorContext(config, "small.toml", tmp_path).tiny_run
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


Split = list[np.ndarray[Any, Any]]


def rewrite(folder: Path, out: Path, change: Callable[[Split, Split], None]) -> Path:
    """The documents of a prepared folder, changed, with a manifest that matches them."""
    manifest = read_manifest(folder)
    train, validation = (
        [np.concatenate(pieces) for pieces in documents_of(shard_spans(folder, manifest, split, None))]
        for split in ("train", "validation")
    )
    change(train, validation)
    out.mkdir()
    shards = {}
    for split, documents in (("train", train), ("validation", validation)):
        writer = ShardWriter(out, split, manifest.vocab_size, 1500)
        for ids in documents:
            writer.add(ids.astype(np.uint32), ids.size)
        shards[split] = writer.finish()
    shutil.copytree(folder / "tokenizer", out / "tokenizer")
    write_manifest(out, dataclasses.replace(manifest, documents=len(train) + len(validation), **shards))
    return out


def drop_separators(train: Split, validation: Split) -> None:
    for split in (train, validation):
        split[:] = [ids[1:] for ids in split]


def move_separators(train: Split, validation: Split) -> None:
    for split in (train, validation):
        split[:] = [np.roll(ids, -1) for ids in split]


def double_separators(train: Split, validation: Split) -> None:
    train[:] = [np.concatenate([ids[:1], ids]) for ids in train]


def share_a_document(train: Split, validation: Split) -> None:
    train.append(validation[2])


def shift_ids(train: Split, validation: Split) -> None:
    """Other ids, as if another tokenizer had written them."""
    for split in (train, validation):
        split[:] = [np.concatenate([ids[:1], (ids[1:] + 200) % 256]) for ids in split]


@pytest.mark.parametrize(
    "change, name, words",
    [
        (drop_separators, "boundaries", "has 0 end-of-text ids for its"),
        (move_separators, "boundaries", "train-00000.bin does not begin with end-of-text"),
        (double_separators, "boundaries", "two end-of-text ids in a row"),
        (share_a_document, "disjoint", "1 held-out documents are in the training text as well"),
    ],
)
def test_damaged_text_is_found(
    change: Callable[[Split, Split], None],
    name: str,
    words: str,
    check: Check,
    prepared: Path,
    tmp_path: Path,
) -> None:
    found = check(*DATA_CHECKS, data=DataConfig(data=str(rewrite(prepared, tmp_path / "rewritten", change))))
    assert failed(found) == {name}
    assert words in cause(found, name)


def test_rewritten_text_passes(check: Check, prepared: Path, tmp_path: Path) -> None:
    """The negative control of the tests above."""
    folder = rewrite(prepared, tmp_path / "rewritten", lambda train, validation: None)
    assert failed(check(data=DataConfig(data=str(folder)))) == set()


def test_flipped_bit_is_found(check: Check, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 200)
        (byte,) = file.read(1)
        file.seek(HEADER_BYTES + 200)
        file.write(bytes([byte ^ 1]))
    found = check(*DATA_CHECKS, data=DataConfig(data=str(folder)))
    assert failed(found) == {"shards"}
    assert "train-00000.bin" in cause(found, "shards")


def test_wrong_tokenizer_is_found(check: Check, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(prepared, folder)
    shutil.rmtree(folder / "tokenizer")
    Characters("abcdefghijklm").save(folder / "tokenizer")
    found = check(*DATA_CHECKS, data=DataConfig(data=str(folder)))
    assert failed(found) == {"tokenizer"}
    assert "tokenizer" in cause(found, "tokenizer")


def test_tokenizer_with_other_ids_is_found(check: Check, prepared: Path, tmp_path: Path) -> None:
    """Its fingerprint is the manifest's, but another one wrote the shards."""
    folder = rewrite(prepared, tmp_path / "rewritten", shift_ids)
    found = check(*("shards", "tokenizer", "boundaries"), data=DataConfig(data=str(folder)))
    assert failed(found) == {"tokenizer"}
    assert "written with another one" in cause(found, "tokenizer")


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
    sizes = dataclasses.replace(recipe().model, vocab_size=300)
    found = check(
        *("shards", "boundaries", "initial-loss", "gradients"),
        data=DataConfig(data="data/fineweb-edu"),
        model=sizes,
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
        (["small.toml", "--only", "gradient"], "only=gradient"),
        (["small.toml", "--benchmarks", "nowhere.jsonl"], "benchmarks=nowhere.jsonl"),
        (["small.toml", "--baseline", "no-such-model"], "no-such-model"),
        (["small.toml", "--data", "no/such/folder"], "no/such/folder"),
        (["small.toml", "--n-head", "3"], "n_head=3"),
        ([], "needs a recipe"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_wrong_use_is_one_sentence(
    words: list[str],
    complaint: str,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    assert main(["doctor", *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
