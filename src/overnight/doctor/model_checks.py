"""Checks of training: initial loss, gradients, accumulation, overfitting, checkpoints, precision, processes.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.distributed.world import World
from overnight.doctor.check import CheckResult
from overnight.doctor.tiny_run import IN_PROCESS, TinyRun, read_steps, write_task
from overnight.doctor.two_processes import run_in_two
from overnight.model.gpt import GPT
from overnight.model.loss import LossSum
from overnight.run.setup import RunSetup
from overnight.training import step as step_module
from overnight.training.batch import constant_plan
from overnight.training.checkpoint import load, save
from overnight.training.schedule import Schedule, ScheduleConfig
from overnight.training.sharding import Replicated
from overnight.training.state import TrainState
from overnight.training.step import TrainSetup

INITIAL_STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: of the embedding and the tied head
INITIAL_TOLERANCE = 0.1  # nats, besides the spread of a logit: ids of a text are not uniform
OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_NATS = 200, 32, 0.1
ROUNDING = 1e-4  # of float32 sums in another order, relative; observed: 1e-7
SAVED_STEPS = 2
# Relative, of the loss and of the gradient, by precision. In float32 only sums are in another order. In 16
# bits the loss may be off by a unit or two in the last place (2^-8 of bfloat16, 2^-11 of float16), and the
# gradient by the roundings of a dozen products in a row.
TOLERANCES = {
    "fp32": (1e-5, 1e-3),
    "tf32": (1e-3, 2e-2),
    "fp16": (1e-3, 2e-2),
    "bf16": (4e-3, 1e-1),
}
PROCESSES_TOLERANCE = 1e-4  # of the losses and norms of the first steps; observed: 1e-7


def check_initial_loss(run: RunSetup) -> CheckResult:
    """The loss before the first step is what GPT-2's initialisation gives.

    A hidden state after a layer norm has C channels of variance 1, so that its product with a row of the
    embedding, N(0, 0.02), has variance s^2 = 0.02^2 C. The logits are nearly normal: the mean of their
    log-sum-exp is ln V + s^2 / 2, and that of the target's logit is 0.
    """
    model, batch = run.state.model, step_batch(run)
    with torch.no_grad():
        nats = run.training.loss(batch.ids, batch.targets)
    loss = LossSum(nats, batch.targets.numel()).per_token()
    spread = INITIAL_STANDARD_DEVIATION * math.sqrt(model.config.n_embd)
    expected = math.log(model.vocab_size) + spread**2 / 2
    tolerance = INITIAL_TOLERANCE + spread
    side = "higher" if loss > expected else "lower"
    cause = {
        "higher": "weights with too large a standard deviation make a model confident without reason: look "
        "at the initialisation in model/gpt.py, and at what is summed in model/loss.py",
        "lower": "an untrained model can't know the text: are targets the NEXT ids (data/loader.py), is the "
        "sum of nats divided twice, is the head tied?",
    }[side]
    return CheckResult(
        passed=abs(loss - expected) <= tolerance,
        measured=f"{loss:.3f} nats",
        bound=f"{expected:.3f} ± {tolerance:.2f} (ln V and a little)",
        cause=f"the loss before the first step is {side} than chance: {cause}",
        figures={"loss": loss, "expected": expected, "tolerance": tolerance},
    )


def check_gradients(run: RunSetup) -> CheckResult:
    """Every parameter gets a gradient that is finite and not zero, and is updated by the optimizer."""
    batch = step_batch(run)
    run.training.loss(batch.ids, batch.targets).backward()  # type: ignore[no-untyped-call]
    named = dict(run.state.model.named_parameters())
    missing = [name for name, each in named.items() if each.grad is None]
    infinite = [
        name for name, each in named.items() if each.grad is not None and not bool(each.grad.isfinite().all())
    ]
    zero = [name for name, each in named.items() if each.grad is not None and not bool(each.grad.any())]
    updated = {id(each) for group in run.state.optimizer.param_groups for each in group["params"]}
    forgotten = [name for name, each in named.items() if id(each) not in updated]
    faults = {
        "gets no gradient: it is frozen, or cut off by a detach() between it and the loss": missing,
        "gets a gradient that is not finite: look for a division by zero or an overflow": infinite,
        "gets a gradient of zeros: its output does not reach the loss": zero,
        "is in no parameter group of the optimizer, and so never updated: look at optim.py": forgotten,
    }
    found = [f"{_name_some(names)} {fault}" for fault, names in faults.items() if names]
    wrong = {name for names in faults.values() for name in names}
    return CheckResult(
        passed=not wrong,
        measured=f"{len(named) - len(wrong)} of {len(named)}",
        bound="all finite, none zero, all updated",
        cause="; ".join(found),
        figures={"parameters": len(named), "sound": len(named) - len(wrong)},
    )


def check_overfit(run: RunSetup) -> CheckResult:
    """Training on the beginning of one row, repeated, brings its loss near 0.

    With a learning rate for so small a model; 23 to 55 steps were enough for 16 to 128 channels.
    """
    row = RepeatedRow(run.training.data.batch(0, 1))
    plan = constant_plan(row.tokens, micro_batch_size=1)
    rate = min(1e-2, 0.4 / run.state.model.config.n_embd)
    constant = ScheduleConfig(total_steps=OVERFIT_STEPS, learning_rate_decay="constant")
    schedule = Schedule(constant, rate, plan, OVERFIT_STEPS)
    training = dataclasses.replace(run.training, data=row, plan=plan, schedule=schedule)
    first = loss = math.inf
    steps = 0
    while steps < OVERFIT_STEPS and not loss < OVERFIT_NATS / 2:
        loss = step_module.train_step(run.state, training).loss
        first = loss if steps == 0 else first
        steps += 1
        if not math.isfinite(loss):
            break
    return CheckResult(
        passed=loss <= OVERFIT_NATS,
        measured=f"{loss:.3f} nats after {steps} steps",
        bound=f"at most {OVERFIT_NATS} (from {first:.2f})",
        cause="a model that can't memorize one row learns nothing: the optimizer does not apply gradients "
        "(optim.py, its settings in the recipe: beta1, beta2, epsilon, max_grad_norm), or the loss and the "
        "gradient are of different tokens",
        figures={"loss": loss, "steps": steps, "first_loss": first},
    )


class RepeatedRow:
    """The beginning of one row, whatever row is asked for."""

    def __init__(self, row: Batch) -> None:
        self._row = Batch(row.ids[:, :OVERFIT_TOKENS], row.targets[:, :OVERFIT_TOKENS])
        self.tokens = self._row.ids.shape[1]

    def batch(self, _first_row: int, _rows: int) -> Batch:
        """Always the same row."""
        return self._row


def check_accumulation(tiny: TinyRun) -> CheckResult:
    """A step in micro-batches equals the step in one, and both have the gradient of the mean loss."""
    parts, whole = tiny.build(), tiny.build()
    plan, state = parts.training.plan, parts.state
    rows = plan.micro_batches(state.step) * plan.micro_batch_size
    at_once = dataclasses.replace(whole.training, plan=constant_plan(plan.tokens_per_row, rows))
    by_hand = tiny.build()
    batch = step_batch(by_hand)
    mean = by_hand.training.loss(batch.ids, batch.targets) / batch.targets.numel()
    mean.backward()  # type: ignore[no-untyped-call]
    expected = {name: each.grad for name, each in by_hand.state.model.named_parameters()}
    steps = [measure_step(parts.state, parts.training), measure_step(whole.state, at_once)]
    off: dict[str, float] = {}
    for step in steps:
        loss = abs(step.loss - mean.item()) / max(abs(mean.item()), 1e-9)
        gradient = compare_gradients(step.gradients, expected)
        for name, each in (("loss", loss), ("gradient", gradient)):
            off[name] = max(each, off.get(name, 0.0)) if math.isfinite(each) else math.inf
    count = plan.micro_batches(state.step)
    ratio = steps[0].grad_norm / max(steps[1].grad_norm, 1e-12)
    differing = " and ".join(name for name, each in off.items() if not each <= ROUNDING)
    return CheckResult(
        passed=all(each <= ROUNDING for each in off.values()),
        measured=f"off by {max(off.values()):.1e}",
        bound=f"{ROUNDING:.0e}, {count} micro-batches or 1",
        cause=f"a step in micro-batches is not the mean over its tokens ({differing} differs, its gradient "
        f"is {ratio:.3g} times that of one micro-batch): nats and gradients must be summed and divided once "
        "by ALL tokens of the step; look at train_step in training/step.py and at training/sharding.py",
        figures={f"{name}_relative_difference": each for name, each in off.items()} | {"norm_ratio": ratio},
    )


def _name_some(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def check_compiled(tiny: TinyRun) -> CheckResult:
    """The compiled step has the loss and the gradient of the same step, not compiled."""
    return _compare(
        measure_pass(tiny.build(compile=True)),
        measure_pass(tiny.build()),
        "fp32",
        "torch.compile changes the result of the step: try a newer torch, or give --compile False; in your "
        "own change, look at what NextTokenLoss in training/compute.py compiles",
    )


def check_precision(tiny: TinyRun, precision: str) -> CheckResult:
    """Loss and gradient in the recipe's precision are near those in float32."""
    return _compare(
        measure_pass(tiny.build(precision=precision)),
        measure_pass(tiny.build()),
        precision,
        f"something is rounded to {precision} that must stay in float32: sums, layer norms, the softmax, the "
        "loss (model/loss.py), the weights themselves (training/compute.py); or this device computes it "
        "inaccurately: try --precision fp32",
    )


def _compare(found: MeasuredStep, expected: MeasuredStep, precision: str, cause: str) -> CheckResult:
    loss_bound, gradient_bound = TOLERANCES[precision]
    loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-9)
    gradient = compare_gradients(found.gradients, expected.gradients)
    return CheckResult(
        passed=loss <= loss_bound and gradient <= gradient_bound,
        measured=f"off by {loss:.1e}, {gradient:.1e}",
        bound=f"{loss_bound:.0e} loss, {gradient_bound:.0e} gradient ({precision})",
        cause=f"losses {found.loss:.5f} and {expected.loss:.5f}, gradient norms {found.grad_norm:.5g} and "
        f"{expected.grad_norm:.5g}: {cause}",
        figures={"loss_relative_difference": loss, "gradient_relative_difference": gradient},
    )


def check_processes(tiny: TinyRun, scratch: Path) -> CheckResult:
    """Two processes, which communicate through gloo, take the same first steps as one."""
    scratch.mkdir()
    write_task(tiny.recipe, scratch)
    run_in_two(IN_PROCESS, [str(scratch)], scratch / "logs")
    return compare_steps(tiny.first_steps(), read_steps(scratch))


Steps = Sequence[tuple[float, float]]
"""(loss, gradient norm) of the first steps."""


def compare_steps(alone: Steps, together: Steps) -> CheckResult:
    """The steps of one process and of two are the same but for rounding."""
    pairs = [
        (mine, theirs)
        for one, two in zip(alone, together, strict=True)
        for mine, theirs in zip(one, two, strict=True)
    ]
    each = [abs(mine - theirs) / max(abs(mine), 1e-9) for mine, theirs in pairs]
    off = max(each) if all(map(math.isfinite, each)) else math.inf
    (loss, norm), (loss_of_two, norm_of_two) = alone[0], together[0]
    return CheckResult(
        passed=off <= PROCESSES_TOLERANCE,
        measured=f"off by {off:.1e}" if math.isfinite(off) else "not finite",
        bound=f"{PROCESSES_TOLERANCE:.0e}, {len(alone)} steps",
        cause="two processes do not take the same steps as one (loss "
        f"{loss_of_two:.5f} instead of {loss:.5f}, gradient norm {norm_of_two:.5g} instead of {norm:.5g}): "
        "gradients and nats must be SUMMED over processes once a step, before clipping "
        "(training/sharding.py, World.all_reduce), and each process computes its own micro-batches "
        "(training/batch.py)",
        figures={"relative_difference": off},
    )


def check_saving(tiny: TinyRun, folder: Path) -> CheckResult:
    """A checkpoint loaded into another state gives the same weights, moments and step, to the bit."""
    saved, loaded = tiny.build(), tiny.build()
    for _ in range(SAVED_STEPS):
        step_module.train_step(saved.state, saved.training)
    written = save.save_checkpoint(saved.state, folder)
    load.load_checkpoint(loaded.state, written)
    faults = _compare_runs(saved.state, loaded.state)
    parameters = len(dict(saved.state.model.named_parameters()))
    return CheckResult(
        passed=not faults,
        measured="equal to the bit" if not faults else f"{len(faults)} differ",
        bound=f"{parameters} weights, moments, step",
        cause=f"a resumed run would differ: {'; '.join(faults[:3])}; look at save_checkpoint and "
        "load_checkpoint in training/checkpoint",
        figures={"differences": len(faults)},
    )


def _compare_runs(saved: TrainState, loaded: TrainState) -> list[str]:
    """The differences, for a person."""
    faults = []
    if saved.step != loaded.step:
        faults.append(f"the step is {loaded.step} instead of {saved.step}")
    others = dict(loaded.model.named_parameters())
    for name, weight in saved.model.named_parameters():
        if not torch.equal(weight, others[name]):
            off = (weight - others[name]).detach().abs().max().item()
            faults.append(f"the weights {name} differ by {off:.1e}")
        before, after = saved.optimizer.state[weight], loaded.optimizer.state.get(others[name], {})
        faults += [
            f"{name} has lost AdamW's {moment}"
            if moment not in after
            else f"AdamW's {moment} of {name} differs"
            for moment, value in before.items()
            if moment not in after or not torch.equal(torch.as_tensor(value), torch.as_tensor(after[moment]))
        ]
    return faults


class MeasuredStep(NamedTuple):
    """The result of one step."""

    loss: float
    """Nats per token."""
    grad_norm: float
    gradients: Mapping[str, Tensor | None]
    """By parameter, of the mean over the step's tokens, before clipping."""


def step_batch(run: RunSetup) -> Batch:
    """All rows of the next step in one batch."""
    plan, step = run.training.plan, run.state.step
    first, rows = plan.rows(step, 0)
    return run.training.data.batch(first, rows * plan.micro_batches(step))


class GradientRecorder(Replicated):
    """Replicated training that keeps a copy of the gradients before they are clipped."""

    def __init__(self, model: GPT, world: World) -> None:
        super().__init__(model, world)
        self.gradients: dict[str, Tensor | None] = {}

    def reduce(self, nats: Tensor, number: int, count: int) -> Tensor:
        """As `Replicated.reduce`."""
        total = super().reduce(nats, number, count)
        if number == count - 1:
            named = self.model.named_parameters()
            self.gradients = {name: None if each.grad is None else each.grad.clone() for name, each in named}
        return total


def measure_step(state: TrainState, training: TrainSetup) -> MeasuredStep:
    """Do the step with `train_step`."""
    recorder = GradientRecorder(state.model, training.world)
    result = step_module.train_step(state, dataclasses.replace(training, sharing=recorder))
    return MeasuredStep(result.loss, result.grad_norm, recorder.gradients)


def compare_gradients(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The norm of the difference of all parameters' gradients, relative to the norm of `expected`."""
    off = whole = 0.0
    for name, wanted in expected.items():
        given = found[name]
        wanted_or_zero = torch.zeros(()) if wanted is None else wanted.double()
        given_or_zero = torch.zeros(()) if given is None else given.double()
        off += float((given_or_zero - wanted_or_zero).square().sum())
        whole += float(wanted_or_zero.square().sum())
    return float((off / max(whole, 1e-300)) ** 0.5)


def measure_pass(run: RunSetup) -> MeasuredStep:
    """One micro-batch forward and backward, without an update."""
    batch = run.training.data.batch(*run.training.plan.rows(run.state.step, 0))
    nats, scaler = run.training.loss(batch.ids, batch.targets), run.state.scaler
    scaler.scale(nats / batch.targets.numel()).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: None if each.grad is None else each.grad / scaler.get_scale()
        for name, each in run.state.model.named_parameters()
    }
    norms = [each.norm() for each in gradients.values() if each is not None]
    return MeasuredStep(nats.item() / batch.targets.numel(), float(torch.stack(norms).norm()), gradients)
