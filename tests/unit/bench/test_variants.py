"""Which variants a machine has, and that each computes what float32 does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from overnight.bench import variants, worker
from overnight.bench.variants import VARIANTS, Machine, choose_variants, stack_tasks, tolerance
from overnight.bench.worker import StepTask, build_step
from overnight.training import ComputeConfig
from overnight.training.compute import resolve_compute

from .conftest import TINY, task_of

PUBLISHED = task_of(dataclasses.replace(TINY, vocab_size=50_257))
CPU = Machine(
    device="cpu", native="bf16", tf32=False, compiler=True, glibc=True, fp8_unavailable_reason="no fp8"
)
H200 = dataclasses.replace(CPU, device="cuda", tf32=True, fp8_unavailable_reason=None)
T4 = dataclasses.replace(H200, native="fp16", tf32=False)
APPLE = dataclasses.replace(CPU, device="mps", native="fp32", glibc=False)
OLD_CPU = dataclasses.replace(CPU, native="fp32", compiler=False, glibc=False)
LAST = "pad-vocab fused-adamw"


def chosen(machine: Machine, names: list[str] | None = None) -> list[str]:
    found = choose_variants(names, machine, PUBLISHED)
    return [name for name, reason in found.items() if reason is None]


@pytest.mark.parametrize(
    "machine, names",
    [
        (H200, f"float32 tf32 bf16 compile fused-attention {LAST} micro-batch"),
        (T4, f"float32 fp16 compile fused-attention {LAST} micro-batch"),
        (CPU, f"float32 bf16 compile fused-attention block-attention {LAST} large-pages micro-batch"),
        (OLD_CPU, f"float32 fused-attention {LAST} micro-batch"),
        (APPLE, "float32 fused-attention pad-vocab micro-batch"),
    ],
)
def test_machine_gets_the_variants_it_can_run(machine: Machine, names: str) -> None:
    assert chosen(machine) == names.split()


@pytest.mark.parametrize(
    "machine, changes, name, reason",
    [
        (T4, {}, "tf32", "Ampere"),
        (T4, {}, "bf16", "cuda does not multiply bf16"),
        (OLD_CPU, {}, "compile", "compiler"),
        (OLD_CPU, {}, "block-attention", "bfloat16"),
        (OLD_CPU, {}, "large-pages", "glibc"),
        (H200, {}, "large-pages", "cuda"),
        (APPLE, {}, "compile", "Apple"),
        (APPLE, {}, "fused-adamw", "Apple"),
        (CPU, {"model": dataclasses.replace(TINY, vocab_size=50_304)}, "pad-vocab", "multiple of 64"),
        (CPU, {"micro_batches": 1}, "micro-batch", "one micro-batch"),
    ],
)
def test_skipped_variant_has_its_reason(
    machine: Machine, changes: dict[str, object], name: str, reason: str
) -> None:
    baseline = dataclasses.replace(PUBLISHED, **changes)  # type: ignore[arg-type]
    assert reason in str(choose_variants(None, machine, baseline)[name])
    if name not in {"bf16", "fp16"}:  # emulated, and so slow: only when named
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            choose_variants(["fused-attention", name], machine, baseline)


@pytest.mark.parametrize(
    "machine, names, expected",
    [
        (CPU, "fused-adamw activation-checkpointing fused-adamw", "fused-adamw activation-checkpointing"),
        (CPU, "float32 chunked-head", "chunked-head"),
        (OLD_CPU, "bf16", "bf16"),
        (CPU, "nice-numbers recompute", "pad-vocab activation-checkpointing"),
    ],
)
def test_named_variants_follow_float32(machine: Machine, names: str, expected: str) -> None:
    assert chosen(machine, names.split()) == ["float32", *expected.split()]


@pytest.mark.parametrize(
    "names, words",
    [
        ("tf32 fp8-head", "tf32.*; .*fp8-head.*no fp8"),
        ("block-attention bf16", "block-attention.* bf16"),
    ],
)
def test_named_variant_that_can_t_run_is_refused(names: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_variants(names.split(), CPU, PUBLISHED)


def test_last_variant_is_what_train_decides() -> None:
    *_, last = stack_tasks(chosen(CPU), PUBLISHED).values()
    assert last == dataclasses.replace(
        PUBLISHED,
        compute=resolve_compute(ComputeConfig(precision="bf16", compile=True), "cpu"),
        micro_batches=1,
        vocabulary_multiple=64,
        fused_optimizer=True,
        large_pages=True,
    )


def losses(task: StepTask, steps: int = 4) -> list[float]:
    step = build_step(task)
    return [step().loss for _ in range(steps)]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepTask:
    """A task of the tiny model with a text, and a learning rate at which so small a model learns."""
    monkeypatch.setattr(worker, "PEAK_LEARNING_RATE", 0.1)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).zipf(1.5, size=16 * 16 + 1) % 300)
    return task_of(ids=str(tmp_path / "ids.npy"))


@pytest.mark.parametrize(
    "name",
    ["bf16", "fused-attention", "pad-vocab", "fused-adamw", "micro-batch", "activation-checkpointing"],
)
def test_variant_computes_what_float32_does(task: StepTask, name: str) -> None:
    changed, reference = variants.change(task, VARIANTS[name]), losses(task)
    assert abs(reference[0] - reference[-1]) > 0.05  # so the comparison includes updates
    assert losses(changed) == pytest.approx(reference, abs=tolerance(changed))


def test_overflow_of_float16_is_repeated(task: StepTask, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, reference = variants.change(task, VARIANTS["fp16"]), losses(task)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    monkeypatch.setattr(worker, "build_scaler", lambda device, precision: scaler)
    assert losses(changed) == pytest.approx(reference, abs=tolerance(changed))
    assert scaler.get_scale() < 2**30  # it did overflow


def test_another_learning_rate_exceeds_the_tolerance(task: StepTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the two tests above."""
    reference = losses(task)
    monkeypatch.setattr(worker, "PEAK_LEARNING_RATE", 0.09)
    worst = max(abs(a - b) for a, b in zip(losses(task), reference, strict=True))
    assert worst > tolerance(task)
