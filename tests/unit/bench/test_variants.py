"""Which rungs a machine has, and that each computes what the ground does."""

import dataclasses

import numpy as np
import pytest
import torch

from overnight.bench import variants, worker
from overnight.bench.variants import LADDER, VARIANTS, Machine, baseline_compute, choose_variants, tolerance
from overnight.bench.worker import StepTask, build_step, read_task
from overnight.model.model_config import ModelConfig
from overnight.training import ComputeConfig, state
from overnight.training.compute import resolve_compute

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=300)
PUBLISHED = dataclasses.replace(TINY, vocab_size=50257)

CPU = Machine(device="cpu", native="bf16", tf32=False, compiler=True, glibc=True, fp8_obstacle="no fp8")
H200 = Machine(device="cuda", native="bf16", tf32=True, compiler=True, glibc=True, fp8_obstacle=None)
T4 = dataclasses.replace(H200, native="fp16", tf32=False)
APPLE = Machine(device="mps", native="fp32", tf32=False, compiler=True, glibc=False, fp8_obstacle="no fp8")
OLD_CPU = dataclasses.replace(CPU, native="fp32", compiler=False, glibc=False)

SAME_ON_A_CPU = (
    "bf16",
    "fused-attention",
    "nice-numbers",
    "fused-adamw",
    "micro-batch",
    "activation_checkpointing",
)


def ground(model: ModelConfig = PUBLISHED, device: str = "cpu", micro_batches: int = 2) -> StepTask:
    return StepTask(
        model=model,
        compute=baseline_compute(device),
        ids="",
        rows_per_step=2,
        micro_batches=micro_batches,
        vocabulary_multiple=1,
        fused_optimizer=False,
        large_pages=False,
    )


def climbed(machine: Machine, names: list[str] | None = None, **changes) -> list[str]:
    below = ground(device=machine.device, **changes)
    return list(choose_variants(names, machine, below).tasks(below))


def test_each_machine_climbs_what_it_has() -> None:
    everything = ["float32", "tf32", "bf16", "compile", "fused-attention", "nice-numbers", "fused-adamw"]
    assert climbed(H200) == [*everything, "micro-batch"]
    assert climbed(T4) == ["float32", "fp16", *everything[3:], "micro-batch"]
    blocks = ["float32", "bf16", "compile", "fused-attention", "block-attention", "nice-numbers"]
    assert climbed(CPU) == [*blocks, "fused-adamw", "large-pages", "micro-batch"]
    assert climbed(OLD_CPU) == ["float32", "fused-attention", "nice-numbers", "fused-adamw", "micro-batch"]
    assert climbed(APPLE) == ["float32", "fused-attention", "nice-numbers", "micro-batch"]


@pytest.mark.parametrize(
    ("machine", "changes", "name", "reason"),
    [
        (CPU, {}, "tf32", "it takes an NVIDIA GPU since Ampere (2020), not cpu"),
        (T4, {}, "tf32", "it takes an NVIDIA GPU since Ampere (2020), not cuda"),
        (T4, {}, "bf16", "cuda does not multiply bf16 in hardware"),
        (OLD_CPU, {}, "bf16", "cpu does not multiply bf16 in hardware"),
        (OLD_CPU, {}, "compile", "no C++ compiler, or no Python headers, were found"),
        (OLD_CPU, {}, "block-attention", "it is for CPUs that multiply bfloat16 in hardware"),
        (OLD_CPU, {}, "large-pages", "the C library is not glibc"),
        (H200, {}, "large-pages", "it is the CPU's memory that is meant, not that of cuda"),
        (APPLE, {}, "compile", "torch.compile does not train on Apple's GPUs"),
        (APPLE, {}, "fused-adamw", "torch has none for Apple's GPUs"),
        (
            CPU,
            {"model": dataclasses.replace(TINY, vocab_size=50304)},
            "nice-numbers",
            "50,304 is a multiple of 64",
        ),
        (CPU, {"micro_batches": 1}, "micro-batch", "the step has one micro-batch as it is"),
    ],
)
def test_a_rung_that_is_skipped_has_its_reason(
    machine: Machine, changes: dict[str, object], name: str, reason: str
) -> None:
    below = ground(device=machine.device, **changes)  # type: ignore[arg-type]
    assert choose_variants(None, machine, below).skipped[name] == reason
    if name not in {"bf16", "fp16"}:
        with pytest.raises(ValueError, match=f"^the rung {name} can't be climbed here: ") as refused:
            choose_variants(["fused-attention", name], machine, below)
        assert str(refused.value).endswith(reason)


def test_rungs_that_are_named_are_climbed_in_that_order_above_float32() -> None:
    assert climbed(CPU, ["fused-adamw", "activation_checkpointing", "fused-adamw"]) == [
        "float32",
        "fused-adamw",
        "activation_checkpointing",
    ]
    assert climbed(CPU, ["float32", "chunked-head"]) == ["float32", "chunked-head"]
    assert climbed(OLD_CPU, ["bf16"]) == ["float32", "bf16"]  # emulated, and so slow: only if asked for


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["compil"], "there is no rung compil; did you mean compile?"),
        (["fp8-head"], "the rung fp8-head can't be climbed here: no fp8"),
        (["tf32", "fp8-head"], "the rung tf32 can't be .*; the rung fp8-head can't be .*"),
        (["block-attention", "bf16"], "the rung block-attention has .*, which takes the rung bf16 below it"),
    ],
)
def test_a_rung_that_is_named_and_not_there_is_refused(names: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        choose_variants(names, CPU, ground())


def test_every_rung_changes_something_and_keeps_the_rest() -> None:
    for rung in LADDER[1:]:
        before = ground()
        after = variants.change(before, rung)
        changed = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
        assert changed == {*rung.task, *({"compute"} if rung.compute else ())}
        assert len(rung.about) <= 80 - len("  fused-attention  ")  # one line of a terminal


def test_the_highest_rung_is_what_train_decides() -> None:
    below = ground()
    *_, highest = choose_variants(None, CPU, below).tasks(below).values()
    asked = ComputeConfig(precision="bf16", compile=True)
    assert highest.compute == resolve_compute(asked, "cpu")
    assert (highest.vocabulary_multiple, highest.fused_optimizer, highest.large_pages) == (64, True, True)


def test_a_task_is_read_as_it_was_written() -> None:
    task = variants.change(ground(), VARIANTS["activation_checkpointing"])
    line = task.as_json()
    assert "\n" not in line
    assert read_task(line) == task


def losses(task: StepTask, steps: int = 4) -> list[float]:
    step = build_step(task)
    return [step().loss for _ in range(steps)]


@pytest.fixture
def trained(tmp_path, monkeypatch) -> StepTask:
    """A task of the tiny model, with a text to read, and a learning rate at which so small a model moves."""
    monkeypatch.setattr(worker, "PEAK_LEARNING_RATE", 0.1)
    ids = np.random.default_rng(0).zipf(1.5, size=16 * 16 + 1) % 300
    np.save(tmp_path / "ids.npy", ids)
    return dataclasses.replace(ground(TINY), ids=str(tmp_path / "ids.npy"))


@pytest.mark.parametrize("name", SAME_ON_A_CPU)
def test_a_rung_computes_what_the_ground_does(trained: StepTask, name: str) -> None:
    task = variants.change(trained, VARIANTS[name])
    reference = losses(trained)
    assert abs(reference[0] - reference[-1]) > 0.05  # so the agreement is about updates, too
    assert losses(task) == pytest.approx(reference, abs=tolerance(task))


def test_an_overflow_of_float16_is_tried_again(trained: StepTask, monkeypatch) -> None:
    task, reference = variants.change(trained, VARIANTS["fp16"]), losses(trained)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    monkeypatch.setattr(state, "build_scaler", lambda device, precision: scaler)
    assert losses(task) == pytest.approx(reference, abs=tolerance(task))
    assert scaler.get_scale() < 2**30  # it did overflow


def test_another_step_is_not_the_ground_s(trained: StepTask, monkeypatch) -> None:
    reference = losses(trained)
    monkeypatch.setattr(worker, "PEAK_LEARNING_RATE", 0.09)
    worst = max(abs(a - b) for a, b in zip(losses(trained), reference, strict=True))
    assert worst > tolerance(trained)
