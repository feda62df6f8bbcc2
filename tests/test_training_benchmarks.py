"""Training steps beside the peers': what is taken from them, that all do the same work, their processes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=64)  # nothing to pad

LECTURE = """
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

class DataLoaderLite:
    pass

raise SystemExit("the program runs")
"""

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
    bias: bool = True
    dropout: float = 0.0

class DataLoaderLite:
    pass

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = dict(vars(config))
        del sizes["bias"]
        self.transformer = overnight.model.gpt.GPT(
            ModelConfig(context_length=sizes.pop("block_size"), **sizes)
        )

    def forward(self, ids, targets):
        logits = self.transformer(ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas=(0.9, 0.95), device_type=None):
        kinds = [[w for w in self.parameters() if (w.dim() >= 2) == decays] for decays in (True, False)]
        groups = [{"params": kinds[0], "weight_decay": weight_decay}, {"params": kinds[1], "weight_decay": 0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8)
"""

NANOGPT_FILES = ("train.py", "config/train_shakespeare_char.py", "data/shakespeare_char/prepare.py")


def lecture(folder: Path, program: str = LECTURE) -> Path:
    """A folder that looks like build-nanogpt's checkout."""
    (folder / "train_gpt2.py").write_text(program, encoding="utf-8")
    return folder


def nanogpt(folder: Path, program: str = SAME_MODEL) -> Path:
    """A folder that looks like nanoGPT's checkout."""
    for name in NANOGPT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "model.py").write_text(program, encoding="utf-8")
    return folder


def fresh_model(config: ModelConfig = TINY) -> GPT:
    model = GPT(config)
    initialize(model, seed=0)
    return model


# ---------------------------------------------------------------- what is taken from a checkout


def test_of_a_peer_s_program_only_the_definitions_are_taken(
    benchmarks: dict[str, Any], tmp_path: Path
) -> None:
    checkouts = benchmarks["checkouts"]
    module = checkouts.load_definitions(checkouts.BUILD_NANOGPT, lecture(tmp_path))
    model = module.GPT(module.GPTConfig())  # the program's `raise SystemExit` was not reached
    assert model.width == 2.0  # its own imports are there
    assert model.configure_optimizers() == "silent"
    assert "hellaswag" not in sys.modules
    assert not hasattr(module, "render_example")


LLM_C_HALF = {"train_gpt2.c": "void gpt2_update() {}", "llmc/dataloader.h": ""}


@pytest.mark.parametrize(
    ("option", "files", "reason"),
    [
        ("--peer", {}, "build-nanogpt: there is no train_gpt2.py in it"),
        ("--peer", {"train_gpt2.py": "class GPT: ..."}, "does not define GPTConfig and DataLoaderLite"),
        ("--peer", {"train_gpt2.py": "def ("}, "is not Python"),
        ("--nanogpt", {}, "nanoGPT: there is no model.py in it"),
        ("--nanogpt", {"model.py": "x = 1"}, "nanoGPT: there is no train.py in it"),
        ("--nanogpt", {"model.py": "x = 1"} | dict.fromkeys(NANOGPT_FILES, ""), "define GPT and GPTConfig"),
        ("--llmc", {}, "llm.c: there is no train_gpt2.c in it"),
        ("--llmc", LLM_C_HALF, "train_gpt2.c does not define gpt2_build_from_checkpoint"),
    ],
)
def test_another_folder_is_refused_in_one_sentence_with_status_2(
    benchmarks: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    files: dict[str, str],
    reason: str,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    train_step = benchmarks["train_step"]
    options = train_step.read_options([option, str(tmp_path)])
    assert benchmarks["measure"].run_plainly(lambda: train_step.measure(options), as_json=False) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"benchmark: {tmp_path} is not a checkout of ")
    assert reason in said
    assert said.count("\n") == 1


def test_on_a_gpu_llm_c_is_a_program_that_was_built(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    checkouts = benchmarks["checkouts"]
    program = tmp_path / "train_gpt2cu"
    for path in (tmp_path, program):
        with pytest.raises(ValueError, match="holds no train_gpt2cu: build it"):
            checkouts.check_llm_c(path, "cuda")
    program.touch()
    assert checkouts.find_cuda_program(tmp_path) == checkouts.find_cuda_program(program) == program


# ---------------------------------------------------------------- the same work


def test_a_peer_begins_with_our_weights_but_for_its_padding(benchmarks: dict[str, Any]) -> None:
    ours = fresh_model().weights()
    theirs = nn.ModuleDict({"transformer": GPT(dataclasses.replace(TINY, vocab_size=128))})
    for weight in theirs.parameters():
        nn.init.constant_(weight, 7.0)
    benchmarks["peers"].copy_weights(ours, theirs)
    copied = dict(theirs.named_parameters())
    assert all(torch.equal(copied[f"transformer.{name}"][: len(ours[name])], ours[name]) for name in ours)
    assert (copied["transformer.wte.weight"][TINY.vocab_size :] == 7.0).all()
    with pytest.raises(AssertionError, match=r"ln_f\.bias"):
        benchmarks["peers"].copy_weights({n: w for n, w in ours.items() if n != "ln_f.bias"}, theirs)


def test_a_peer_without_biases_may_leave_out_those_that_are_zero(benchmarks: dict[str, Any]) -> None:
    theirs = nn.Module()
    theirs.weight = nn.Parameter(torch.zeros(2))
    ours = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    benchmarks["peers"].copy_weights(ours, theirs)
    assert theirs.weight.tolist() == [1.0, 1.0]
    with pytest.raises(AssertionError, match="bias is not zero"):
        benchmarks["peers"].copy_weights(ours | {"bias": torch.ones(2)}, theirs)
    with pytest.raises(AssertionError, match="scale"):
        benchmarks["peers"].copy_weights(ours | {"scale": torch.zeros(2)}, theirs)


def build_tasks(benchmarks: dict[str, Any], folder: Path, **changes: Any) -> tuple[Any, list[Any]]:
    """Our task, and those of the three peers, whose model in two of them is ours."""
    ids = torch.randint(64, (6 * 4 * 16 + 1,), generator=torch.Generator().manual_seed(0)).numpy()
    np.save(folder / "ids.npy", ids)
    settings = {"precision": "fp32", "compile": False, "device": "cpu", "rows": 2, "micro_batches": 2}
    ours = benchmarks["stepper"].Task(
        peer=None, checkout=None, model=dataclasses.asdict(TINY), folder=str(folder), **settings | changes
    )
    places = {"build-nanogpt": lecture(folder, SAME_MODEL), "nanogpt": nanogpt(folder), "transformers": None}
    theirs = [
        dataclasses.replace(ours, peer=peer, checkout=str(place) if place else None)
        for peer, place in places.items()
    ]
    return ours, theirs


def test_every_peer_has_our_losses(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = build_tasks(benchmarks, tmp_path)
    losses = []
    for task in (ours, *theirs):
        turn, precision = benchmarks["stepper"].build(task)
        assert precision == "fp32"
        losses.append([turn()["losses"][0] for _ in range(4)])
    assert all(each == pytest.approx(losses[0], abs=1e-5) for each in losses[1:])
    assert abs(losses[0][0] - losses[0][3]) > 1e-3  # so the agreement is about updates, too


def test_a_peer_that_reads_other_rows_has_other_losses(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = build_tasks(benchmarks, tmp_path)
    expected = benchmarks["stepper"].build(ours)[0]()["losses"]
    for change in ({"rows": 1}, {"micro_batches": 1}):
        turn, _ = benchmarks["stepper"].build(dataclasses.replace(theirs[0], **change))
        assert abs(turn()["losses"][0] - expected[0]) > 1e-4


def test_a_gpu_s_float32_is_named_by_what_multiplies_it(benchmarks: dict[str, Any]) -> None:
    name: Callable[..., str] = benchmarks["peers"].precision_name
    allowing, strict = SimpleNamespace(allows_tf32=True), SimpleNamespace(allows_tf32=False)
    assert name(allowing, SimpleNamespace(precision="fp32", device="cuda")) == "tf32"
    assert name(strict, SimpleNamespace(precision="fp32", device="cuda")) == "fp32"
    assert name(allowing, SimpleNamespace(precision="fp32", device="cpu")) == "fp32"
    assert name(allowing, SimpleNamespace(precision="bf16", device="cuda")) == "bf16"


# ---------------------------------------------------------------- llm.c


def read_llm_c(path: Path, config: ModelConfig, *, bf16: bool) -> list[torch.Tensor]:
    """The tensors of a checkpoint, in the order in which llm.c's loader lays its pointers."""
    header = np.fromfile(path, dtype=np.int32, count=256)
    assert header[:3].tolist() == [20240326, 5 if bf16 else 3, config.context_length]
    vocab_size, layers, heads, width, padded = header[3:8].tolist()
    assert (vocab_size, layers, heads) == (config.vocab_size, config.n_layer, config.n_head)
    shapes: list[tuple[int, ...]] = [
        (padded, width),
        (config.context_length, width),
        (layers, width),
        (layers, width),
    ]
    shapes += [(layers, 3 * width, width), (layers, 3 * width), (layers, width, width), (layers, width)]
    shapes += [(layers, width), (layers, width), (layers, 4 * width, width), (layers, 4 * width)]
    shapes += [(layers, width, 4 * width), (layers, width), (width,), (width,)]
    raw = np.fromfile(path, dtype=np.int16 if bf16 else np.float32, offset=1024)
    flat = torch.from_numpy(raw).view(torch.bfloat16 if bf16 else torch.float32).float()
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("bf16", [False, True])
def test_llm_c_begins_with_our_weights(benchmarks: dict[str, Any], tmp_path: Path, bf16: bool) -> None:
    config = dataclasses.replace(TINY, n_layer=2, vocab_size=200)
    model = fresh_model(config)
    for weight in model.parameters():
        weight.data.normal_()
    model.zero_padding()
    benchmarks["llmc"].write_checkpoint(tmp_path / "model.bin", model, bf16=bf16)
    tensors = read_llm_c(tmp_path / "model.bin", config, bf16=bf16)
    ours = model.weights()
    names = [*("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"), "attn.c_proj.weight"]
    names += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"]
    names += ["mlp.c_proj.weight", "mlp.c_proj.bias"]
    expected = [F.pad(ours["wte.weight"], (0, 0, 0, 56)), ours["wpe.weight"]]  # 256 rows
    expected += [torch.stack([ours[f"h.{layer}.{name}"] for layer in range(2)]) for name in names]
    expected += [ours["ln_f.weight"], ours["ln_f.bias"]]
    for found, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(found, wanted.bfloat16().float() if bf16 else wanted)


def test_llm_c_reads_ids_where_our_shards_have_them(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    from overnight.data.shards import open_tokens

    benchmarks["llmc"].write_tokens(tmp_path / "ids.bin", np.arange(1000))
    assert open_tokens(tmp_path / "ids.bin").tolist() == list(range(1000))


# As much of llm.c as the driver calls: its "loss" is the first input and the last target.
FAKE_LLM_C = """
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#define fopenCheck fopen
#define freadCheck(to, size, count, file) assert(fread(to, size, count, file) == (size_t)(count))
#define fcloseCheck fclose
#define fseekCheck fseek
#define mallocCheck malloc
typedef struct { int context, updates; float mean_loss; } GPT2;
static void gpt2_build_from_checkpoint(GPT2 *model, const char *path) {
    int header[8];
    FILE *file = fopen(path, "rb");
    freadCheck(header, sizeof(int), 8, file);
    fclose(file);
    model->context = header[2];
    model->updates = 0;
    printf("this would garble the answers\\n");
}
static void gpt2_forward(GPT2 *model, int *inputs, int *targets, size_t rows, size_t context) {
    assert((int)context == model->context);
    model->mean_loss = inputs[0] + 1000.0f * targets[rows * context - 1];
}
static void gpt2_zero_grad(GPT2 *model) { (void)model; }
static void gpt2_backward(GPT2 *model) { (void)model; }
static void gpt2_update(GPT2 *model, float rate, float b1, float b2, float eps, float decay, int t) {
    assert(t == ++model->updates && rate > 0.99e-4f * t / 10 * 6 && b1 + b2 + eps + decay > 0);
}
static void gpt2_free(GPT2 *model) { (void)model; }
#ifndef TESTING
#error "its main would be compiled as well"
#endif
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_llm_c_steps_on_the_same_rows_when_it_is_told_to(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    sides, stepper = benchmarks["sides"], benchmarks["stepper"]
    (tmp_path / "llmc").mkdir()
    (tmp_path / "llmc/dataloader.h").touch()
    (tmp_path / "train_gpt2.c").write_text(FAKE_LLM_C, encoding="utf-8")
    benchmarks["checkouts"].check_llm_c(tmp_path, "cpu")
    np.save(tmp_path / "ids.npy", np.arange(3 * 2 * 16 + 1, dtype=np.uint16))
    task = stepper.Task(
        peer="llm.c",
        checkout=str(tmp_path),
        precision=None,
        compile=False,
        device="cpu",
        model=dataclasses.asdict(TINY),
        rows=2,
        micro_batches=1,
        folder=str(tmp_path),
    )
    with sides.at_work([sides.SIDES["llm.c"]], lambda _: task) as (process,):
        assert process.about["precision"] == "fp32"
        turns = [process.step() for _ in range(3)]
    assert [turn["losses"] for turn in turns] == [[32000.0], [64032.0], [96064.0]]
    assert all(turn["milliseconds"] >= 0 and turn["peak_bytes"] > 0 for turn in turns)


FAKE_CUDA_PROGRAM = """#!{python}
import struct, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
header = struct.unpack("3i", open(options["-e"], "rb").read(12))
assert header == (20240326, 5, 16), header
magic, version, count = struct.unpack("3i", open(options["-i"], "rb").read(12))
assert count == int(options["-d"]) + 1 == int(options["-b"]) * int(options["-t"]) * 2 + 1
print("| max_steps | " + options["-x"])
for step in range(1, int(options["-x"]) + 1):
    ms = 900.0 if step == 1 else 100.0 * step
    print(f"step {{step:4d}}/4 | loss 10.98{{step}} (+nanz)| norm 15.1 (+nanz)| lr 6.00e-05 | "
          f"{{ms:.2f}} ms | 44.0% bf16 MFU | 500000 tok/s")
"""


def test_llm_c_on_a_gpu_is_its_own_program_run_for_a_few_steps(
    benchmarks: dict[str, Any], tmp_path: Path
) -> None:
    program = tmp_path / "train_gpt2cu"
    program.write_text(FAKE_CUDA_PROGRAM.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    ours, _ = build_tasks(benchmarks, tmp_path)
    task = dataclasses.replace(ours, peer="llm.c", checkout=str(tmp_path), device="cuda")
    turn, precision = benchmarks["stepper"].build(task)
    assert precision == "bf16"
    assert turn() == {"milliseconds": 300.0, "losses": [10.981], "peak_bytes": None}
    with pytest.raises(ValueError, match="printed no steps"):
        benchmarks["llmc"].read_cuda_steps("CUDA error: out of memory")


# ---------------------------------------------------------------- sides


def circumstances(sides: Any, **found: Any) -> Any:
    everything = {"device": "cpu", "missing": {}, "compiler": True, "glibc": True, "bf16": True}
    return sides.Circumstances(**everything | found)


def chosen(sides: Any, names: list[str] | None = None, **found: Any) -> list[str]:
    return [side.name for side in sides.choose_sides(names, circumstances(sides, **found))[0]]


def test_the_sides_that_make_sense_are_measured(benchmarks: dict[str, Any]) -> None:
    sides = benchmarks["sides"]
    ours = ["overnight, eager", "overnight, compiled", "overnight, large pages"]
    peers = [
        f"{peer}, {way}" for peer in ("build-nanogpt", "nanoGPT", "Transformers") for way in ("bf16", "fp32")
    ]
    compiled = [f"{name} compiled" for name in peers]
    assert set(chosen(sides)) == {*ours, "llm.c", *(name for name in peers + compiled if "bf16" in name)}
    assert set(chosen(sides, bf16=False)) == {*ours, "llm.c", *(n for n in peers + compiled if "fp32" in n)}
    assert not any("nanogpt" in name for name in chosen(sides, missing={"build-nanogpt": "it is not there"}))
    assert not any("compiled" in name for name in chosen(sides, compiler=False))
    assert "overnight, large pages" in chosen(sides, compiler=False)
    assert "overnight, large pages" not in chosen(sides, glibc=False)
    assert "overnight, large pages" not in chosen(sides, device="cuda")


def test_it_is_said_once_why_sides_are_left_out(benchmarks: dict[str, Any]) -> None:
    sides = benchmarks["sides"]
    _, said = sides.choose_sides(None, circumstances(sides, missing={"nanogpt": "it is not there"}))
    assert said[1] == (
        "Left out, since it is not there: nanoGPT, fp32; nanoGPT, fp32 compiled; nanoGPT, bf16; "
        "nanoGPT, bf16 compiled."
    )
    assert said[0].startswith("Left out, since bfloat16 is faster here (--sides runs it all the same): ")
    assert len(said) == 2


def test_a_named_side_runs_or_is_refused(benchmarks: dict[str, Any]) -> None:
    sides = benchmarks["sides"]
    assert chosen(sides, ["nanogpt-bf16", "overnight"], bf16=False) == ["nanoGPT, bf16", "overnight, eager"]
    assert chosen(sides, ["nanogpt-fp32"]) == ["nanoGPT, fp32"]
    with pytest.raises(ValueError, match=r"the side llm\.c can't run: --llmc names no checkout"):
        chosen(sides, ["llm.c"], missing={"llm.c": "--llmc names no checkout"})


def test_a_process_steps_when_told_with_its_own_environment_and_waits_idly(
    benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = benchmarks["sides"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    task, _ = build_tasks(benchmarks, tmp_path)
    np.save(tmp_path / "ids.npy", np.resize(np.arange(64, dtype=np.uint16), 4 * 4 * 16 + 1))
    pair = [sides.SIDES["overnight"], sides.SIDES["overnight-large-pages"]]
    with sides.at_work(pair, lambda _: task) as two:
        assert [process.about["precision"] for process in two] == ["fp32", "fp32"]
        environments = [read_environment(process) for process in two]
        answers = [[process.step() for process in two] for _ in range(3)]
    assert "GLIBC_TUNABLES" not in environments[0]
    assert "hugetlb=1" in environments[1]["GLIBC_TUNABLES"]
    losses = [[each["losses"][0] for each in step] for step in answers]
    assert losses[0][0] == pytest.approx(math.log(64), abs=0.05)
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


# ---------------------------------------------------------------- the table


class Stand:
    """What a process would answer: a step takes so long."""

    def __init__(self, name: str, times: list[float], first_loss: float = 10.9) -> None:
        self.name, self._times, self._first_loss = name, iter(times), first_loss
        self.about = {"precision": "bf16", "threads": 2}

    def step(self) -> dict[str, Any]:
        loss, self._first_loss = self._first_loss, 9.0
        waited = {"waited_seconds": 1.0, "waited_cpu_seconds": 0.01}
        return {"milliseconds": next(self._times), "losses": [loss], "peak_bytes": 2e9, **waited}


def test_the_table_compares_within_each_round_and_leaves_warm_ups_out(
    benchmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, sides = benchmarks["train_step"], benchmarks["sides"]
    monkeypatch.setattr(train_step, "find_peak_flops_or_measure", lambda device, precision: 1e12)
    options = train_step.read_options(
        ["--rows", "1", "--micro-batches", "1", "--steps", "3", "--warm-ups", "2"]
    )
    ours, theirs = sides.SIDES["overnight-compiled"], sides.SIDES["nanogpt-bf16"]
    processes = [Stand(ours.name, [9e9, 9e9, 100, 1000, 100]), Stand(theirs.name, [1, 1, 200, 2000, 2000])]
    measured = train_step.take_turns(processes, options)
    assert train_step.find_ours([sides.SIDES["overnight"], ours, theirs]) == ours.name
    model = dataclasses.replace(train_step.PRESETS["gpt2-124m"], context_length=1024)
    first, second = train_step.table_rows(measured, ours.name, model, options)
    assert first == [
        *("overnight, compiled", "bf16", "100", "100", "1,000", "10,240"),
        f"{10240 * model.flops_per_token() / 1e12:.1%}",
        f"{10240 * model.executed_flops_per_token('none') / 1e12:.1%}",
        *("1.00x as fast", "2.00", "10.9000", "9.0000"),
    ]
    assert second[8] == "2.00x as fast"  # the ratio of the medians would be 20
    notes = train_step.describe_figures(measured, ours.name, model, options)
    assert "The first losses lie within 0.0000 nats." in notes


def test_sides_that_do_other_work_are_found_out(benchmarks: dict[str, Any]) -> None:
    train_step = benchmarks["train_step"]
    options = train_step.read_options(["--rows", "1", "--micro-batches", "1"])
    processes = [Stand("a", [1.0] * 8), Stand("b", [1.0] * 8, first_loss=11.0)]
    measured = train_step.Measured(
        {each.name: [each.step()] for each in processes}, {each.name: each.about for each in processes}, {}
    )
    model = train_step.PRESETS["gpt2-124m"]
    notes = train_step.describe_figures(measured, "a", model, options)
    assert any("THE SIDES DO NOT DO THE SAME WORK" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--warm-ups", "1"], "--warm-ups 1 is too few; give at least 2"),
        (["--rows", "0"], "--rows 0 is too few"),
        (["--micro-batches", "0"], "--micro-batches 0 is too few"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(benchmarks: dict[str, Any]) -> None:
    train_step = benchmarks["train_step"]
    with pytest.raises(ValueError, match="device=cuda: this machine has none"):
        train_step.measure(train_step.read_options(["--device", "cuda"]))


def test_a_turn_on_a_gpu_reads_two_steps_and_one_ahead(benchmarks: dict[str, Any]) -> None:
    train_step = benchmarks["train_step"]
    words = ["--rows", "2", "--micro-batches", "3", "--context", "4", "--steps", "1", "--warm-ups", "2"]
    model, ids = TINY, np.arange(50)
    for device, steps in (("cpu", 4), ("cuda", 7)):
        options = train_step.read_options([*words, "--device", device])
        assert train_step.fit_ids(ids, options, model).size == steps * 24 + 1


def test_every_figure_can_be_had_as_json(
    benchmarks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, measure = benchmarks["train_step"], benchmarks["measure"]
    measured = train_step.Measured({"a": [Stand("a", [1.0]).step()]}, {"a": {"threads": 2}}, {"bf16": 1e12})
    report = measure.Report(title="T", headings=["side"], rows=[], measured=measured._asdict())
    report.show(as_json=True)
    assert json.loads(capsys.readouterr().out)["measured"]["turns"]["a"][0]["milliseconds"] == 1.0


def test_a_save_that_is_waited_for_and_one_that_is_not(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    saving = benchmarks["saving"]
    state = saving.build_state(
        ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=128, vocab_size=50), "cpu"
    )
    assert all(side() > 0 for side in saving.sides(state, tmp_path).values())
    assert len(saving.step_beside(state, tmp_path, repeats=2)) == 2
    assert list(tmp_path.iterdir()) == []
