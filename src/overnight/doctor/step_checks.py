"""Checks that a step has the same loss and gradients when it is computed in other ways.

In micro-batches, in the recipe's precision, compiled, and in two processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from overnight.config import from_toml, to_toml
from overnight.distributed.launcher import exit_process, terminate_with_parent
from overnight.distributed.processes import first_failed_rank, start_processes
from overnight.distributed.world import SINGLE_PROCESS, join_world
from overnight.doctor.check import CheckResult, skipped
from overnight.doctor.context import DoctorContext, TinyRun, step_batch
from overnight.files import write_atomically
from overnight.hardware import native_precision
from overnight.model.gpt import GPT
from overnight.recipe import Recipe
from overnight.run.setup import RunSetup
from overnight.training.batch import BatchPlan, constant_plan
from overnight.training.compute import can_compile
from overnight.training.step import train_step

ROUNDING = 1e-4  # of float32 sums in another order, relative; observed: 1e-7
# Relative, of the loss and of the gradient, by precision. In float32 only sums are in another order. In 16
# bits the loss may be off by a unit or two in the last place (2^-8 of bfloat16, 2^-11 of float16), and the
# gradient by the roundings of a dozen products in a row.
TOLERANCES = {
    "fp32": (1e-5, 1e-3),
    "tf32": (1e-3, 2e-2),
    "fp16": (1e-3, 2e-2),
    "bf16": (4e-3, 1e-1),
}
STEPS_IN_PROCESSES = 2
# Each process writes its output to a file of its own: torch's agent would leave the files open that it
# redirects to.
INTO_FILE = (
    "import os, sys; log = os.open(f'{sys.argv[1]}/{os.getpid()}.log', os.O_CREAT | os.O_WRONLY); "
    "os.dup2(log, 1); os.dup2(log, 2); "
)
IN_PROCESS = "from overnight.doctor.step_checks import train_in_process; train_in_process(sys.argv[1])"

Steps = Sequence[tuple[float, float]]
"""(loss, gradient norm) of the first steps."""


class MeasuredStep(NamedTuple):
    """The result of one step."""

    loss: float
    """Nats per token."""
    gradient: Tensor
    """Gradient of the mean loss before clipping, (parameters,), float64, on the CPU."""

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient."""
        return float(self.gradient.norm())


def check_accumulation(context: DoctorContext) -> CheckResult:
    """A step in micro-batches equals the step in one, and both have the gradient of the mean loss."""
    parts, whole, by_hand = (context.tiny_run.build() for _ in range(3))
    plan = parts.training.plan
    count = plan.micro_batches(0)
    at_once = constant_plan(plan.tokens_per_row, count * plan.micro_batch_size)
    expected = measure_pass(by_hand)
    steps = [measure_step(parts, plan), measure_step(whole, at_once)]
    compared = [compare_steps(step, expected) for step in steps]
    off = {name: max(each[name] for each in compared) for name in ("loss", "gradient")}
    ratio = steps[0].grad_norm / max(steps[1].grad_norm, 1e-12)
    differing = " and ".join(name for name, each in off.items() if each > ROUNDING)
    return CheckResult(
        passed=not differing,
        measured=f"off by {max(off.values()):.1e}",
        bound=f"{ROUNDING:.0e}, {count} micro-batches or 1",
        cause=f"a step in micro-batches is not the mean over its tokens ({differing} differs, its gradient "
        f"is {ratio:.3g} times that of one micro-batch): nats and gradients must be summed and divided once "
        "by ALL tokens of the step; look at train_step in training/step.py and at training/sharding.py",
        figures={f"{name}_relative_difference": each for name, each in off.items()} | {"norm_ratio": ratio},
    )


def check_precision(context: DoctorContext) -> CheckResult:
    """Loss and gradient in the recipe's precision are near those in float32."""
    asked, native = context.recipe.compute.precision, native_precision(context.world.device)
    if asked == "fp32":
        return skipped("the recipe computes in float32 throughout")
    precision = asked or ("bf16" if native == "fp32" else native)
    return _compare_with_plain(
        context,
        {"precision": precision},
        precision,
        f"something is rounded to {precision} that must stay in float32: sums, layer norms, the softmax, the "
        "loss (model/loss.py), the weights themselves (training/compute.py); or this device computes it "
        "inaccurately: try --precision fp32",
    )


def check_compiled(context: DoctorContext) -> CheckResult:
    """The compiled step has the loss and the gradient of the same step, not compiled."""
    if context.recipe.compute.compile is False:
        return skipped("the recipe does not compile")
    if not can_compile() or context.world.device == "mps":
        return skipped("torch.compile finds no C++ compiler here, or can't be used on this device")
    return _compare_with_plain(
        context,
        {"compile": True},
        "fp32",
        "torch.compile changes the result of the step: try a newer torch, or give --compile False; in your "
        "own change, look at what NextTokenLoss in training/compute.py compiles",
    )


def _compare_with_plain(
    context: DoctorContext, compute: Mapping[str, object], precision: str, cause: str
) -> CheckResult:
    """A step with these fields of ComputeConfig has the loss and the gradient of one in plain float32."""
    # Measured before the next is built: building sets torch's precision of float32 products.
    found = measure_pass(context.tiny_run.build(**compute))
    expected = measure_pass(context.tiny_run.build())
    bounds = dict(zip(("loss", "gradient"), TOLERANCES[precision], strict=True))
    off = compare_steps(found, expected)
    return CheckResult(
        passed=all(off[name] <= bound for name, bound in bounds.items()),
        measured=f"off by {off['loss']:.1e}, {off['gradient']:.1e}",
        bound=", ".join(f"{bound:.0e} {name}" for name, bound in bounds.items()) + f" ({precision})",
        cause=f"losses {found.loss:.5f} and {expected.loss:.5f}, gradient norms {found.grad_norm:.5g} and "
        f"{expected.grad_norm:.5g}: {cause}",
        figures={f"{name}_relative_difference": each for name, each in off.items()},
    )


def compare_steps(found: MeasuredStep, expected: MeasuredStep) -> dict[str, float]:
    """The relative difference of the "loss", and of the "gradient" by its norm."""
    distance = (found.gradient - expected.gradient).norm().item()
    return {
        "loss": as_share(found.loss - expected.loss, expected.loss),
        "gradient": as_share(distance, expected.grad_norm),
    }


def as_share(difference: float, expected: float) -> float:
    """The size of a difference relative to `expected`; infinite if either is not finite."""
    share = abs(difference) / max(abs(expected), 1e-9)
    return share if math.isfinite(share) else math.inf


def measure_pass(run: RunSetup) -> MeasuredStep:
    """All rows of a step forward and backward at once, without an update."""
    batch = step_batch(run)
    nats, scaler, tokens = run.training.loss(batch.ids, batch.targets), run.state.scaler, batch.ids.numel()
    scaler.scale(nats / tokens).backward()  # type: ignore[no-untyped-call]
    return MeasuredStep(nats.item() / tokens, _gradient_of(run.state.model) / scaler.get_scale())


def measure_step(run: RunSetup, plan: BatchPlan) -> MeasuredStep:
    """Do the step with `train_step`, without clipping, in the micro-batches of `plan`."""
    recorded = [torch.full((1,), math.nan)]  # stays NaN if the optimizer takes no step
    run.state.optimizer.register_step_pre_hook(lambda *_: recorded.append(_gradient_of(run.state.model)))
    result = train_step(run.state, dataclasses.replace(run.training, max_grad_norm=None, plan=plan))
    return MeasuredStep(result.loss, recorded[-1])


def _gradient_of(model: GPT) -> Tensor:
    """A copy of all gradients, end to end; zeros for a parameter without one."""
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in model.parameters()]
    return torch.cat([each.detach().cpu().double().flatten() for each in gradients])


# Two processes


def check_processes(context: DoctorContext) -> CheckResult:
    """Two processes, which communicate through gloo, take the same first steps as one."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return skipped("this torch has no gloo, the backend for processes on a CPU")
    recipe, folder = context.tiny_run.recipe, context.scratch / "two"
    folder.mkdir()
    write_atomically(folder / "task.toml", to_toml(recipe))
    run_in_two(IN_PROCESS, folder)
    together = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return compare_first_steps(first_steps(TinyRun(recipe, SINGLE_PROCESS)), together)


def compare_first_steps(alone: Steps, together: Steps) -> CheckResult:
    """The steps of one process and of two are the same but for rounding."""
    pairs = zip(itertools.chain(*alone), itertools.chain(*together), strict=True)
    off = max(as_share(two - one, one) for one, two in pairs)
    (loss, norm), (loss_of_two, norm_of_two) = alone[0], together[0]
    return CheckResult(
        passed=off <= ROUNDING,
        measured=f"off by {off:.1e}",
        bound=f"{ROUNDING:.0e}, {len(alone)} steps",
        cause="two processes do not take the same steps as one (loss "
        f"{loss_of_two:.5f} instead of {loss:.5f}, gradient norm {norm_of_two:.5g} instead of {norm:.5g}): "
        "gradients and nats must be SUMMED over processes once a step, before clipping "
        "(training/sharding.py, World.all_reduce), and each process computes its own micro-batches "
        "(training/batch.py)",
        figures={"relative_difference": off},
    )


def first_steps(tiny: TinyRun) -> Steps:
    """Train the first steps and return their losses and gradient norms."""
    run = tiny.build()
    results = [train_step(run.state, run.training) for _ in range(STEPS_IN_PROCESSES)]
    return [(result.loss, result.grad_norm) for result in results]


def train_in_process(folder: str) -> None:
    """Entry point of one of several processes: do the first steps of the recipe in `folder`, then exit."""
    terminate_with_parent()
    recipe = from_toml(Recipe, (Path(folder) / "task.toml").read_text(encoding="utf-8"), "task.toml")
    with join_world("cpu", recipe.compute.timeout_seconds) as world:
        steps = first_steps(TinyRun(recipe, world))
        if world.is_main:
            write_atomically(Path(folder) / "steps.json", json.dumps(steps))
    exit_process(0)


def run_in_two(line: str, folder: Path) -> None:
    """Run a line of Python, with `folder` in sys.argv, in two processes that can communicate through gloo.

    Their output goes to files in `folder`. Raises RuntimeError, with its last line of output, if one fails.
    """
    try:
        words = ("-c", INTO_FILE + line, str(folder))
        start_processes(words, 2, DefaultLogsSpecs(log_dir=str(folder)))
    except ChildFailedError as error:
        rank = first_failed_rank(error.failures)
        log = folder / f"{error.failures[rank].pid}.log"
        output = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
        last_line = output.rpartition("\n")[2] or "it printed nothing"
        raise RuntimeError(f"process {rank} of two failed: {last_line}") from None
