"""The rungs of the speed ladder: what each changes in a training step, and what it needs of the machine."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from overnight.bench.worker import StepTask
from overnight.config import nearest
from overnight.hardware import native_precision
from overnight.model.loss_kernels import fp8_unavailable_reason
from overnight.training import Compute
from overnight.training.compute import can_compile

WHOLE_TILES = 64  # tensor cores multiply by tiles; 50,257 rows make 50,304 (a multiple of 128 as well)

# What rounding may change in the losses of the first five steps, in nats per token, by precision: several
# times what GPT-2 124M was seen to differ by on a CPU, 0.00001 in float32 and 0.004 in bf16. With as many
# bits as float16, tf32 should differ by an eighth of bf16's; of the 8-bit head nothing is known yet.
TOLERANCES = {"fp32": 0.0002, "tf32": 0.005, "bf16": 0.02, "fp16": 0.01}
FP8_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change, made on top of those of the rungs before it."""

    name: str
    """As --variants and the table have it."""
    about: str
    compute: Mapping[str, Any] = field(default_factory=dict)
    """The fields of ComputeConfig that it changes."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of StepTask that it changes."""
    is_default: bool = True
    """False for what costs time or exactness: it is shown only when it is named."""


GROUND = Variant(name="float32", about="all in 32 bits, attention written out, nothing compiled")

# The order is that of Karpathy's lecture "Let's reproduce GPT-2 (124M)"; large pages and the larger
# micro-batch, which it does not have, come last.
LADDER: tuple[Variant, ...] = (
    GROUND,
    Variant(
        name="tf32",
        about="matrix products of numbers shortened to 19 bits",
        compute={"precision": "tf32"},
    ),
    Variant(
        name="bf16",
        about="matrix products in 16 bits; weights and sums stay in 32",
        compute={"precision": "bf16"},
    ),
    Variant(
        name="fp16",
        about="matrix products in 16 bits, of a loss that is scaled up",
        compute={"precision": "fp16"},
    ),
    Variant(
        name="compile",
        about="the step as few kernels, which pass over memory less often",
        compute={"compile": True},
    ),
    Variant(
        name="fused-attention",
        about="attention in one kernel, its T x T weights never in memory",
        compute={"attention": "fused"},
    ),
    Variant(
        name="block-attention",
        about="attention in products of blocks, made for bfloat16 units",
        compute={"attention": "blocks"},
    ),
    Variant(
        name="nice-numbers",
        about=f"the vocabulary padded to a multiple of {WHOLE_TILES} rows",
        task={"vocabulary_multiple": WHOLE_TILES},
    ),
    Variant(
        name="fused-adamw",
        about="each weight updated in one pass instead of a dozen",
        task={"fused_optimizer": True},
    ),
    Variant(
        name="large-pages",
        about="memory is kept, in pages of 2 MiB instead of 4 KiB",
        task={"large_pages": True},
    ),
    Variant(
        name="micro-batch",
        about="the rows of a step computed at once instead of in parts",
        task={"micro_batches": 1},
    ),
    Variant(
        name="chunked-head",
        about="logits and losses of some rows at a time: less memory",
        compute={"loss": "chunked"},
        is_default=False,
    ),
    Variant(
        name="fp8-head",
        about="products with the vocabulary in 8 bits: faster, less exact",
        compute={"loss": "fp8"},
        is_default=False,
    ),
    Variant(
        name="activation_checkpointing",
        about="activations computed again, not kept: less memory, slower",
        compute={"activation_checkpointing": "block"},
        is_default=False,
    ),
)
VARIANTS = {rung.name: rung for rung in LADDER}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rung may need, and whether it is there."""

    device: str
    native: str
    """The shortest precision that the device multiplies in hardware."""
    tf32: bool
    compiler: bool
    glibc: bool
    fp8_obstacle: str | None


def find_machine(device: str) -> Machine:
    """What this machine has, seen from one of its devices."""
    return Machine(
        device=device,
        native=native_precision(device),
        tf32=device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0),
        compiler=can_compile(),
        glibc=platform.libc_ver()[0] == "glibc",
        fp8_obstacle=fp8_unavailable_reason(device),
    )


def unavailable_reason(rung: Variant, machine: Machine, ground: StepTask) -> str | None:
    """Why a rung can't be climbed, as a clause; None if it can. `ground` is the task of the first rung."""
    device = machine.device
    vocab_size = ground.model.vocabulary
    obstacles = {
        "tf32": None if machine.tf32 else f"it takes an NVIDIA GPU since Ampere (2020), not {device}",
        "compile": _compile_obstacle(machine),
        "nice-numbers": None
        if vocab_size % WHOLE_TILES
        else f"{vocab_size:,} is a multiple of {WHOLE_TILES}",
        "block-attention": _blocks_obstacle(machine),
        "fused-adamw": "torch has none for Apple's GPUs" if device == "mps" else None,
        "large-pages": _pages_obstacle(machine),
        "micro-batch": None if ground.micro_batches > 1 else "the step has one micro-batch as it is",
        "fp8-head": machine.fp8_obstacle,
    }
    return obstacles.get(rung.name)


def _compile_obstacle(machine: Machine) -> str | None:
    if machine.device == "mps":
        return "torch.compile does not train on Apple's GPUs"
    return None if machine.compiler else "no C++ compiler, or no Python headers, were found"


def _blocks_obstacle(machine: Machine) -> str | None:
    is_made_for_it = (machine.device, machine.native) == ("cpu", "bf16")
    return None if is_made_for_it else "it is for CPUs that multiply bfloat16 in hardware"


def _pages_obstacle(machine: Machine) -> str | None:
    if machine.device != "cpu":
        return f"it is the CPU's memory that is meant, not that of {machine.device}"
    return None if machine.glibc else "the C library is not glibc"


def unreliable_reason(rung: Variant, machine: Machine) -> str | None:
    """Why a rung that was not named is better left out; None if it is not."""
    if rung.name in {"bf16", "fp16"} and rung.name != machine.native:
        return f"{machine.device} does not multiply {rung.name} in hardware"
    return None


@dataclass(frozen=True)
class Selection:
    """The rungs of one ladder, from the ground up: those climbed, and why the others are not."""

    rungs: tuple[Variant, ...]
    skipped: Mapping[str, str]
    """The reason, by the rung's name."""

    def tasks(self, ground: StepTask) -> dict[str, StepTask]:
        """Of each rung that is climbed: the task of the one before it, changed."""
        found, task = {}, ground
        for rung in self.rungs:
            if rung.name not in self.skipped:
                task = change(task, rung)
                found[rung.name] = task
        return found


def choose_variants(names: Sequence[str] | None, machine: Machine, ground: StepTask) -> Selection:
    """The rungs that are named, in that order, above float32; or if none is named, all that make sense here.

    Raises ValueError for a name that is not known, and for a rung that can't be climbed.
    """
    if names is None:
        rungs = [rung for rung in LADDER if rung.is_default]
        if machine.native != "fp16":  # the other way to have 16 bits, for GPUs without bf16
            rungs.remove(VARIANTS["fp16"])
        if machine.device != "cpu":
            rungs.remove(VARIANTS["block-attention"])
        reasons = {
            rung.name: unavailable_reason(rung, machine, ground) or unreliable_reason(rung, machine)
            for rung in rungs
        }
        return Selection(tuple(rungs), {name: reason for name, reason in reasons.items() if reason})
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"there is no rung {name}{nearest(name, VARIANTS)}")
    rungs = [VARIANTS[name] for name in dict.fromkeys([GROUND.name, *names])]
    problems = [
        f"the rung {rung.name} can't be climbed here: {reason}"
        for rung in rungs
        if (reason := unavailable_reason(rung, machine, ground))
    ]
    if problems:
        raise ValueError("; ".join(problems))
    climb = Selection(tuple(rungs), {})
    for name, task in climb.tasks(ground).items():
        if task.compute.attention == "blocks" and task.compute.precision != "bf16":
            raise ValueError(f"the rung {name} has attention in blocks, which takes the rung bf16 below it")
    return climb


def change(task: StepTask, rung: Variant) -> StepTask:
    """The task with the rung's change."""
    return dataclasses.replace(task, compute=dataclasses.replace(task.compute, **rung.compute), **rung.task)


def baseline_compute(device: str) -> Compute:
    """How the machine is used before the first rung: as plainly as can be."""
    return Compute(
        device=device,
        precision="fp32",
        compile=False,
        attention="math",
        loss="full",
        activation_checkpointing="none",
    )


def tolerance(task: StepTask) -> float:
    """By how much a task's losses may differ from float32's, in nats per token."""
    return FP8_TOLERANCE if task.compute.loss == "fp8" else TOLERANCES[task.compute.precision]
