"""The doctor finds what is wrong, says which it is, and leaves the healthy alone."""

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
from overnight.distributed.world import World
from overnight.doctor import CHECKS, DoctorConfig, model_checks
from overnight.doctor import command as doctor_command
from overnight.doctor.check import Check
from overnight.doctor.command import open_doctor_context, run, run_checks
from overnight.generation import generate
from overnight.inspection.statistics import documents_of, shard_spans
from overnight.model import gpt, loss
from overnight.model import gpt as gpt_module
from overnight.planning import command as planning_command
from overnight.recipe import Recipe
from overnight.run import setup
from overnight.run import train as train_module
from overnight.tokenizer.characters import Characters
from overnight.training import ComputeConfig, OptimizerConfig, sharding, step
from overnight.training.checkpoint import load as load_module
from overnight.training.checkpoint import save
from overnight.training.schedule import ScheduleConfig
from overnight.training.step import Backward

SLOW = ("compiled", "processes", "time")
FAST = tuple(name for name in CHECKS if name not in SLOW)
BF16 = ComputeConfig(device="cpu", precision="bf16", compile=False)
Look = Callable[..., dict[str, Check]]
Patch = pytest.MonkeyPatch


@pytest.fixture
def look(recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: Patch) -> Look:
    """Does the checks of a small recipe, all but the slow ones unless they are named."""
    monkeypatch.chdir(tmp_path)

    def look(*only: str, asked: dict[str, Any] | None = None, **changes: object) -> dict[str, Check]:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        (tmp_path / "small.toml").write_text(to_toml(recipe(**changes)))
        config = DoctorConfig(**vars(recipe(**changes)), **(asked or {}))
        to_do = open_doctor_context(config, "small.toml", scratch).checks()
        return {check.name: check for check in run_checks(to_do, only or FAST)}

    return look


def failed(found: dict[str, Check]) -> set[str]:
    """Their names."""
    return {name for name, check in found.items() if check.finding.passed is False}


def cause(found: dict[str, Check], name: str) -> str:
    """The sentence of one that has failed."""
    assert found[name].finding.passed is False, found[name]
    return found[name].finding.cause


# ---------------------------------------------------------------- the healthy


def test_a_healthy_recipe_is_all_green(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All checks but compilation; and everything is left as it was found.

    Not as a command is typed: tyro, which reads those, draws from Python's noise.
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
    said = capsys.readouterr()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == before[2]
    assert {*tmp_path.rglob("*")} == files
    lines = said.err.splitlines()
    assert "FAIL" not in said.err
    assert said.out == ""
    assert all(len(line) <= 80 for line in lines)
    marked = {words[1]: words[0] for line in lines if len(words := line.split()) > 1}
    assert [name for name in CHECKS if marked[name] == "-"] == ["compiled", "reference"]
    assert [name for name in CHECKS if marked[name] == "ok"] == [
        name for name in CHECKS if name not in {"compiled", "reference"}
    ]
    assert any("<|endoftext|>" in line for line in lines)
    assert any("▁" in line or "█" in line for line in lines)
    assert lines[-1] == "next: overnight train small.toml --total-steps 20"


def test_a_program_is_told_every_figure(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    words = ["--only", "gradients", "learning-rate", "precision", "--peak-learning-rate=7", "--json"]
    assert main(["doctor", "small.toml", *words]) == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["passed"] is False
    assert told["recipe"] == "small.toml"
    assert [(check["name"], check["passed"]) for check in told["checks"]] == [
        ("gradients", True),
        ("precision", None),
        ("learning-rate", False),
    ]
    (rate,) = (check for check in told["checks"] if check["name"] == "learning-rate")
    assert rate["figures"]["peak"] == 7
    assert "was a zero lost or added?" in rate["cause"]
    assert said.err.splitlines()[-1] == (
        "mend learning-rate, then: overnight doctor small.toml --peak-learning-rate 7.0"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_step_is_compared(look: Look) -> None:
    found = look("compiled", compute=ComputeConfig(device="cpu", precision="fp32", compile=True))
    assert found["compiled"].finding.passed, found["compiled"].finding.cause


# ---------------------------------------------------------------- the code, sabotaged


def draw_ten_times_too_wide(patch: Patch) -> None:
    patch.setattr(gpt_module, "STANDARD_DEVIATION", 0.2)


def freeze_a_parameter(patch: Patch) -> None:
    place = setup.place_model

    def place_frozen(*given: Any) -> gpt.GPT:
        model = place(*given)
        model.h[1].ln_2.bias.requires_grad = False
        return model

    patch.setattr(setup, "build_sharded_model", place_frozen)


def detach_attention(patch: Patch) -> None:
    def forward(self: Any, x: Tensor, cache: Any = None, document: Any = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, document).detach()
        return x + self.mlp(self.ln_2(x))

    patch.setattr(gpt.Block, "forward", forward)


def forget_a_parameter_in_the_optimizer(patch: Patch) -> None:
    build = setup.build_optimizer_of

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


def scale_accumulated(patch: Patch, factor: Callable[[int], float]) -> None:
    add_up = sharding.add_up

    def add_up_scaled(backward: Backward, mine: range, parameters: Any, world: World) -> Tensor:
        nats = add_up(backward, mine, parameters, world)
        for parameter in parameters:
            parameter.grad *= factor(len(mine))
        return nats

    patch.setattr(sharding, "accumulate_gradients", add_up_scaled)


def average_averages(patch: Patch) -> None:
    scale_accumulated(patch, lambda count: 1 / count)


def forget_to_divide(patch: Patch) -> None:
    scale_accumulated(patch, lambda count: count)


def log_the_last_micro_batch(patch: Patch) -> None:
    def add_up(backward: Backward, mine: range, parameters: Any, world: World) -> Tensor:
        return [backward(number) for number in mine][-1]

    patch.setattr(sharding, "accumulate_gradients", add_up)


def update_nothing(patch: Patch) -> None:
    apply = step.apply_gradients
    patch.setattr(step, "apply_gradients", lambda o, p, _rate, *rest: apply(o, p, 0.0, *rest))


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


def never_come_to_an_end(patch: Patch) -> None:
    multiplier = train_module.learning_rate_multiplier
    patch.setattr(
        train_module,
        "learning_rate_multiplier",
        lambda position, length, config: multiplier(position, 10 * length, config),
    )


def fill_the_disk(patch: Patch) -> None:
    patch.setattr(planning_command.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def take_the_memory_away(patch: Patch) -> None:
    patch.setattr(planning_command, "find_memory_bytes", lambda device: 100_000)


@pytest.mark.parametrize(
    "sabotage, named, sentence",
    [
        (draw_ten_times_too_wide, "initial-loss", "drawn too wide"),
        (freeze_a_parameter, "gradients", "h.1.ln_2.bias gets no gradient: it is frozen"),
        (detach_attention, "gradients", "cut off by a detach()"),
        (forget_a_parameter_in_the_optimizer, "gradients", "wte.weight is in no group of the optimizer"),
        (let_the_future_through, "causality", "the attention mask lets the future through"),
        (average_averages, "accumulation", "gradient differs, its gradient is 0.25 times"),
        (forget_to_divide, "accumulation", "gradient differs, its gradient is 4 times"),
        (log_the_last_micro_batch, "accumulation", "(loss differs"),
        (update_nothing, "overfit", "the optimizer does not move the weights"),
        (shift_cached_positions, "generation", "a position is off by one"),
        (lose_the_moments, "checkpoint", "wte.weight has lost AdamW's exp_avg"),
        (save_in_bfloat16, "checkpoint", "the weights wte.weight differ by"),
        (forget_the_step, "checkpoint", "the step is 0 instead of 2"),
        (predict_the_same_id, "rows", "targets are not the ids that follow"),
        (never_come_to_an_end, "schedule", "the fall is longer than the run"),
        (fill_the_disk, "disk", "the disk of this folder is too small"),
        (take_the_memory_away, "memory", "a step does not fit into the memory"),
    ],
)
def test_sabotaged_code_is_named(
    sabotage: Callable[[Patch], None], named: str, sentence: str, look: Look, monkeypatch: Patch
) -> None:
    sabotage(monkeypatch)
    found = look()
    assert sentence in cause(found, named)
    # Without a cache the future is seen, with one it is not; and the same id is not hard to tell.
    also = {"causality": {"generation"}, "rows": {"initial-loss"}}.get(named, set())
    assert failed(found) - also == {named}


def test_what_needs_gradients_is_not_looked_at_without(look: Look, monkeypatch: Patch) -> None:
    freeze_a_parameter(monkeypatch)
    found = look("gradients", "overfit", "accumulation")
    assert found["overfit"].finding.passed is None
    assert found["accumulation"].finding.cause == "it can't be told before gradients is mended"


def test_compiled_code_that_differs_is_named(look: Look, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "compile", lambda nats, **how: lambda ids, targets: nats(ids, targets) * 1.001)
    monkeypatch.setattr(doctor_command, "can_compile", lambda: True)
    monkeypatch.setattr("overnight.training.compute.can_compile", lambda: True)
    found = look("compiled", compute=ComputeConfig(device="cpu", precision="fp32"))
    assert "torch.compile makes another computation" in cause(found, "compiled")


def test_compiled_code_that_is_the_same_passes(look: Look, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "compile", lambda nats, **how: nats)
    monkeypatch.setattr(doctor_command, "can_compile", lambda: True)
    monkeypatch.setattr("overnight.training.compute.can_compile", lambda: True)
    found = look("compiled", compute=ComputeConfig(device="cpu", precision="fp32"))
    assert found["compiled"].finding.passed, found["compiled"].finding.cause


def test_a_precision_that_rounds_what_it_must_not_is_named(look: Look, monkeypatch: Patch) -> None:
    def rounded(logits: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        if logits.dtype != torch.bfloat16:
            return each.sum()
        return functools.reduce(torch.add, each.bfloat16()).float()

    monkeypatch.setattr(loss, "cross_entropy_nats", rounded)
    found = look("precision", "initial-loss", compute=BF16)
    assert failed(found) == {"precision"}
    assert "something is rounded to bf16 that must stay in float32" in cause(found, "precision")


def test_gradients_that_two_processes_do_not_sum_are_named(
    look: Look, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The sabotage lies where each Python looks when it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "from overnight.distributed.world import World\nWorld.sum = lambda self, tensors: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = look("processes")
    assert "gradients and nats are to be SUMMED over processes" in cause(found, "processes")


def test_a_check_that_raises_has_failed_and_the_others_go_on(look: Look, monkeypatch: Patch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("the disk said no\nand no again")

    monkeypatch.setattr(model_checks, "check_saving", fail)
    found = look("generation", "checkpoint", "learning-rate")
    assert failed(found) == {"checkpoint"}
    assert cause(found, "checkpoint").endswith("as a run would: the disk said no and no again")


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    "changes, named, sentence",
    [
        ({"optimizer": OptimizerConfig(peak_learning_rate=1.0)}, "learning-rate", "training diverges"),
        ({"optimizer": OptimizerConfig(peak_learning_rate=1e-4)}, "learning-rate", "hardly moves"),
        ({"schedule": ScheduleConfig(total_steps=12)}, "schedule", "fresh weights need a warm-up"),
    ],
)
def test_an_unlikely_setting_is_named(changes: Any, named: str, sentence: str, look: Look) -> None:
    found = look(**changes)
    assert failed(found) == {named}
    assert sentence in cause(found, named)


# ---------------------------------------------------------------- the text, damaged


Split = list[np.ndarray[Any, Any]]


def write_anew(folder: Path, out: Path, change: Callable[[Split, Split], None]) -> Path:
    """The documents of a prepared folder, changed, with a manifest that vouches for them."""
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


def spell_otherwise(train: Split, validation: Split) -> None:
    """Each id is one more: as if another tokenizer had written them."""
    for split in (train, validation):
        split[:] = [np.concatenate([ids[:1], (ids[1:] + 200) % 256]) for ids in split]


@pytest.mark.parametrize(
    "change, named, sentence",
    [
        (drop_separators, "boundaries", "has 0 end-of-text ids for its"),
        (move_separators, "boundaries", "train-00000.bin does not begin with end-of-text"),
        (double_separators, "boundaries", "two end-of-text ids stand side by side"),
        (share_a_document, "disjoint", "1 held-out documents are in the training text as well"),
    ],
)
def test_damaged_text_is_named(
    change: Callable[[Split, Split], None],
    named: str,
    sentence: str,
    look: Look,
    prepared: Path,
    tmp_path: Path,
) -> None:
    found = look(data=DataConfig(data=str(write_anew(prepared, tmp_path / "anew", change))))
    assert failed(found) == {named}
    assert sentence in cause(found, named)


def test_text_written_anew_without_change_is_healthy(look: Look, prepared: Path, tmp_path: Path) -> None:
    """The control of the tests above."""
    folder = write_anew(prepared, tmp_path / "anew", lambda train, validation: None)
    assert failed(look(data=DataConfig(data=str(folder)))) == set()


def test_a_flipped_bit_in_a_shard_is_named(look: Look, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 200)
        (byte,) = file.read(1)
        file.seek(HEADER_BYTES + 200)
        file.write(bytes([byte ^ 1]))
    found = look(data=DataConfig(data=str(folder)))
    assert failed(found) == {"shards"}
    assert "train-00000.bin was changed since it was written" in cause(found, "shards")


def test_the_wrong_tokenizer_is_named(look: Look, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(prepared, folder)
    shutil.rmtree(folder / "tokenizer")
    Characters("abcdefghijklm").save(folder / "tokenizer")
    found = look(data=DataConfig(data=str(folder)))
    assert failed(found) == {"tokenizer"}
    assert "is not the tokenizer that made the shards" in cause(found, "tokenizer")


def test_a_tokenizer_that_reads_other_ids_is_named(look: Look, prepared: Path, tmp_path: Path) -> None:
    """Its fingerprint is the manifest's, and still it is not the one that wrote the shards."""
    folder = write_anew(prepared, tmp_path / "anew", spell_otherwise)
    found = look(*("shards", "tokenizer", "boundaries"), data=DataConfig(data=str(folder)))
    assert failed(found) == {"tokenizer"}
    assert "they were written with another one" in cause(found, "tokenizer")


@pytest.mark.parametrize("full", [False, True])
def test_contaminated_text_is_named(full: bool, look: Look, prepared: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared)
    tokenizer = load_prepared_tokenizer(prepared)
    ids = np.concatenate(next(documents_of(shard_spans(prepared, manifest, "train", 1))))
    benchmark = tmp_path / "exam.jsonl"
    benchmark.write_text(json.dumps({"question": tokenizer.decode(ids.tolist())}) + "\n")
    found = look(*("contamination", "shards"), asked={"benchmarks": (str(benchmark),), "full": full})
    assert failed(found) == {"contamination"}
    assert "with exam), whose score would in part be memory" in cause(found, "contamination")


def test_text_that_is_not_prepared_is_told_with_the_command(
    look: Look, recipe: Callable[..., Recipe]
) -> None:
    """The model is tried all the same, on ids without meaning."""
    sizes = dataclasses.replace(recipe().model, vocab_size=300)
    found = look(
        *("shards", "boundaries", "initial-loss", "gradients"),
        data=DataConfig(data="data/fineweb-edu"),
        model=sizes,
    )
    assert found["shards"].finding.passed is None
    assert "overnight prepare fineweb-edu" in found["shards"].finding.cause
    assert found["boundaries"].finding.passed is None
    assert found["initial-loss"].finding.passed
    assert found["gradients"].finding.passed


def test_a_small_text_is_prepared_as_a_run_would(look: Look, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\n\n".join(f"Paragraph {n} says {n}." for n in range(3000)))
    found = look(
        *("shards", "tokenizer", "boundaries"),
        data=DataConfig(data="notes.txt", tokenizer="bpe-300", validation_fraction=0.3),
    )
    assert failed(found) == set()
    assert found["shards"].finding.passed
    assert (tmp_path / "data" / "notes-bpe-300" / "manifest.json").is_file()


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["small.toml", "--only", "gradient"], "only=gradient is no check; did you mean gradients?"),
        (["small.toml", "--benchmarks", "nowhere.jsonl"], "nowhere.jsonl is no .jsonl, .txt, .tokens file"),
        (["small.toml", "--baseline", "no-such-model"], "there is no model no-such-model"),
        (["small.toml", "--data", "no/such/folder"], "nothing lies at no/such/folder"),
        (["small.toml", "--n-head", "3"], "n_embd=16 does not divide among n_head=3"),
        ([], "needs a recipe"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_wrong_use_is_one_plain_sentence(
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
