"""The variants of a training step: what each changes, and what it needs of the machine."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from overnight.bench.worker import StepTask
from overnight.config import nearest
from overnight.hardware import native_precision
from overnight.model.loss_kernels import fp8_unavailable_reason
from overnight.model.model_config import ModelConfig
from overnight.training import Compute
from overnight.training.compute import can_compile

TILE = 64  # tensor cores multiply by tiles; 50,257 rows become 50,304 (a multiple of 128 as well)

# The change of losses that rounding explains in the first five steps, in nats per token, by precision:
# several times the observed differences of GPT-2 124M on a CPU, 0.00001 in float32 and 0.004 in bf16. With
# the mantissa of float16, tf32 should differ by an eighth of bf16's; the 8-bit head is not measured yet.
TOLERANCES = {"fp32": 0.0002, "tf32": 0.005, "bf16": 0.02, "fp16": 0.01}
FP8_TOLERANCE = 0.05


class Variant(NamedTuple):
    """One change, on top of those of the variants before it."""

    name: str
    """Name in --variants and in the table."""
    about: str
    compute: Mapping[str, Any] = {}
    """Changed fields of Compute."""
    task: Mapping[str, Any] = {}
    """Changed fields of StepTask."""


# The order is that of Karpathy's lecture "Let's reproduce GPT-2 (124M)"; large pages and the larger
# micro-batch, which it does not have, come last.
_VARIANTS = (
    Variant("float32", "all in 32 bits, attention written out, nothing compiled"),
    Variant("tf32", "matrix products of inputs rounded to 19 bits", {"precision": "tf32"}),
    Variant("bf16", "matrix products in bfloat16; weights and sums stay float32", {"precision": "bf16"}),
    Variant("fp16", "matrix products in float16, with loss scaling", {"precision": "fp16"}),
    Variant("compile", "the step fused into few kernels: fewer passes over memory", {"compile": True}),
    Variant("fused-attention", "attention in one kernel, without T x T weights", {"attention": "fused"}),
    Variant("block-attention", "attention in blocks, for bfloat16 units", {"attention": "blocks"}),
    Variant("pad-vocab", f"vocabulary padded to a multiple of {TILE}", task={"vocabulary_multiple": TILE}),
    Variant("fused-adamw", "weights updated in one pass, not a dozen", task={"fused_optimizer": True}),
    Variant("large-pages", "memory reused, in pages of 2 MiB, not 4 KiB", task={"large_pages": True}),
    Variant("micro-batch", "the rows of a step at once, not in parts", task={"micro_batches": 1}),
    Variant("chunked-head", "logits of some rows at a time: less memory", {"loss": "chunked"}),
    Variant("fp8-head", "head's products in 8 bits: less exact", {"loss": "fp8"}),
    Variant(
        "activation-checkpointing",
        "activations recomputed: less memory, slower",
        {"activation_checkpointing": "block"},
    ),
)
VARIANTS = {variant.name: variant for variant in _VARIANTS}
ONLY_WHEN_NAMED = {"chunked-head", "fp8-head", "activation-checkpointing"}  # slower, or less exact
BASELINE = "float32"
FORMER_NAMES = {"nice-numbers": "pad-vocab", "recompute": "activation-checkpointing"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Properties of a machine that variants depend on."""

    device: str
    native: str
    """The shortest precision that the device multiplies in hardware."""
    tf32: bool
    compiler: bool
    glibc: bool
    fp8_unavailable_reason: str | None


def find_machine(device: str) -> Machine:
    """The properties of this machine, for one of its devices."""
    return Machine(
        device=device,
        native=native_precision(device),
        tf32=device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0),
        compiler=can_compile(),
        glibc=platform.libc_ver()[0] == "glibc",
        fp8_unavailable_reason=fp8_unavailable_reason(device),
    )


def unavailable_reasons(machine: Machine, baseline: StepTask) -> dict[str, str]:
    """Why variants can't run on a machine, by name, for steps like `baseline`."""
    device, vocab_size = machine.device, baseline.model.vocabulary
    is_mps, is_cpu = device == "mps", device == "cpu"
    conditions = (
        ("tf32", not machine.tf32, f"it needs an NVIDIA GPU since Ampere (2020), not {device}"),
        ("compile", is_mps, "torch.compile does not train on Apple's GPUs"),
        ("compile", not machine.compiler, "no C++ compiler, or no Python headers, were found"),
        (
            "block-attention",
            not (is_cpu and machine.native == "bf16"),
            "it is for CPUs that multiply bfloat16 in hardware",
        ),
        ("pad-vocab", vocab_size % TILE == 0, f"{vocab_size:,} is a multiple of {TILE}"),
        ("fused-adamw", is_mps, "torch has none for Apple's GPUs"),
        ("large-pages", not is_cpu, f"it is for the memory of CPUs, not of {device}"),
        ("large-pages", not machine.glibc, "the C library is not glibc"),
        ("micro-batch", baseline.micro_batches == 1, "the step already has one micro-batch"),
        ("fp8-head", machine.fp8_unavailable_reason is not None, machine.fp8_unavailable_reason or ""),
    )
    reasons: dict[str, str] = {}
    for name, applies, reason in conditions:
        if applies:
            reasons.setdefault(name, reason)
    return reasons


def choose_variants(
    names: Sequence[str] | None, machine: Machine, baseline: StepTask
) -> dict[str, str | None]:
    """The named variants on top of float32, in that order, or all that this machine supports for None.

    Returns the reason for each that is skipped, None for the others. Raises ValueError for an unknown name
    and for a named variant that can't run.
    """
    unavailable = unavailable_reasons(machine, baseline)
    if names is not None:
        return dict.fromkeys(_check_named(names, unavailable))
    chosen = [name for name in VARIANTS if name not in ONLY_WHEN_NAMED]
    if machine.native != "fp16":  # an alternative to bf16, for GPUs without it
        chosen.remove("fp16")
    if machine.device != "cpu":
        chosen.remove("block-attention")
    for name in {"bf16", "fp16"} - {machine.native}:
        unavailable[name] = f"{machine.device} does not multiply {name} in hardware"
    return {name: unavailable.get(name) for name in chosen}


def _check_named(names: Sequence[str], unavailable: Mapping[str, str]) -> list[str]:
    """The names with float32 in front, each once. Raises ValueError if one can't run."""
    named = [FORMER_NAMES.get(name, name) for name in names]
    for name in named:
        if name not in VARIANTS:
            raise ValueError(f"there is no variant {name}{nearest(name, VARIANTS)}")
    chosen = list(dict.fromkeys([BASELINE, *named]))
    problems = [
        f"the variant {name} can't run here: {unavailable[name]}" for name in chosen if name in unavailable
    ]
    if problems:
        raise ValueError("; ".join(problems))
    if "block-attention" in chosen and "bf16" not in chosen[: chosen.index("block-attention")]:
        raise ValueError("the variant block-attention needs the variant bf16 before it")
    return chosen


def stack_tasks(names: Collection[str], baseline: StepTask) -> dict[str, StepTask]:
    """The task of each variant: the change on top of the task before it."""
    found, task = {}, baseline
    for name in names:
        task = found[name] = change(task, VARIANTS[name])
    return found


def change(task: StepTask, variant: Variant) -> StepTask:
    """The task with the variant's change."""
    compute = dataclasses.replace(task.compute, **variant.compute)
    return dataclasses.replace(task, compute=compute, **variant.task)


def baseline_task(model: ModelConfig, device: str, rows_per_step: int, micro_batches: int) -> StepTask:
    """The step before the first variant, without optimizations."""
    compute = Compute(device=device, precision="fp32", compile=False, attention="math", loss="full")
    return StepTask(model=model, compute=compute, rows_per_step=rows_per_step, micro_batches=micro_batches)


def tolerance(task: StepTask) -> float:
    """The largest difference of a task's losses from float32's that rounding explains, in nats per token."""
    return FP8_TOLERANCE if task.compute.loss == "fp8" else TOLERANCES[task.compute.precision]
