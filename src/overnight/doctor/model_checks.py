"""Does it learn? The loss it begins with, the gradients, one batch by heart, a step in parts.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from overnight.data.loader import Batch
from overnight.doctor.check import Build, CheckResult, SetUp
from overnight.model.loss import LossSum
from overnight.training import step as step_module
from overnight.training.batch import constant_plan
from overnight.training.checkpoint import load, save
from overnight.training.schedule import Schedule, ScheduleConfig
from overnight.training.sharding import Replicated
from overnight.training.state import TrainState

INITIAL_STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: of the embedding, and so of the head
INITIAL_TOLERANCE = 0.1  # nats, beside the spread of a logit: text is not drawn evenly from the vocabulary
OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_NATS = 200, 32, 0.1
ROUNDING = 1e-4  # of float32 sums in another order, relative; seen: 1e-7


def check_initial_loss(setup: SetUp) -> CheckResult:
    """The loss before the first step against what GPT-2's initialisation gives.

    A hidden state that comes from a layer norm has C channels of variance 1, so that its product with a row
    of the embedding, N(0, 0.02), has variance s^2 = 0.02^2 C. The logits are near normal: the mean of their
    logarithm's sum is ln V + s^2 / 2, and the wanted one's mean is 0.
    """
    config, training = setup.state.model.config, setup.training
    batch = step_batch(setup)
    with torch.no_grad():
        nats = training.loss(batch.ids, batch.targets)
    loss = LossSum(nats, batch.targets.numel()).per_token()
    spread = INITIAL_STANDARD_DEVIATION * math.sqrt(config.n_embd)
    expected = math.log(setup.state.model.vocab_size) + spread**2 / 2
    tolerance = INITIAL_TOLERANCE + spread
    side = "higher" if loss > expected else "lower"
    cause = {
        "higher": "weights that are drawn too wide make a model sure of what it does not know: look at the "
        "standard deviations of model/initialization.py, and at what is summed in loss.py",
        "lower": "a model that has learnt nothing can't know the text: look whether targets are the ids that "
        "FOLLOW (data/stream.py), whether the sum of nats is divided twice, and whether the head is tied",
    }[side]
    return CheckResult(
        passed=abs(loss - expected) <= tolerance,
        measured=f"{loss:.3f} nats",
        bound=f"{expected:.3f} ± {tolerance:.2f} (ln V and a little)",
        cause=f"the loss before the first step is {side} than chance: {cause}",
        figures={"loss": loss, "expected": expected, "tolerance": tolerance},
    )


def check_gradients(setup: SetUp) -> CheckResult:
    """Every parameter gets a gradient that is finite and not zero."""
    batch = step_batch(setup)
    setup.training.loss(batch.ids, batch.targets).backward()  # type: ignore[no-untyped-call]
    named = dict(setup.state.model.named_parameters())
    missing = [name for name, each in named.items() if each.grad is None]
    infinite = [
        name for name, each in named.items() if each.grad is not None and not bool(each.grad.isfinite().all())
    ]
    zero = [name for name, each in named.items() if each.grad is not None and not bool(each.grad.any())]
    updated = {id(each) for group in setup.state.optimizer.param_groups for each in group["params"]}
    forgotten = [name for name, each in named.items() if id(each) not in updated]
    faults = {
        "gets no gradient: it is frozen, or cut off by a detach() between it and the loss": missing,
        "gets a gradient that is not finite: look for a division by zero or an overflow": infinite,
        "gets a gradient that is zero throughout: what it computes does not reach the loss": zero,
        "is in no group of the optimizer, and so is never updated: look at optim.py": forgotten,
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


def check_overfit(setup: SetUp) -> CheckResult:
    """The beginning of a row, seen again and again, is known by heart: the whole machinery learns.

    At a learning rate that suits so small a model: 23 to 55 steps were seen to do, from 16 to 128 channels.
    """
    row = setup.training.data.batch(0, 1)
    row = Batch(row.ids[:, :OVERFIT_TOKENS], row.targets[:, :OVERFIT_TOKENS])
    rate = min(1e-2, 0.4 / setup.state.model.config.n_embd)
    plan = constant_plan(row.ids.shape[1], micro_batch_size=1)
    constant = ScheduleConfig(total_steps=OVERFIT_STEPS, learning_rate_decay="constant")
    training = dataclasses.replace(
        setup.training,
        data=_OneBatch(row),
        plan=plan,
        schedule=Schedule(constant, rate, plan, OVERFIT_STEPS),
    )
    first = loss = math.inf
    steps = 0
    while steps < OVERFIT_STEPS and not loss < OVERFIT_NATS / 2:
        loss = step_module.train_step(setup.state, training).loss
        first = loss if steps == 0 else first
        steps += 1
        if not math.isfinite(loss):
            break
    return CheckResult(
        passed=loss <= OVERFIT_NATS,
        measured=f"{loss:.3f} nats after {steps} steps",
        bound=f"at most {OVERFIT_NATS} (from {first:.2f})",
        cause="a model that can't learn one row by heart learns nothing: the optimizer does not move the "
        "weights by their gradients (optim.py, its settings in the recipe: beta1, beta2, epsilon, "
        "max_grad_norm), or the loss is of other tokens than the gradient",
        figures={"loss": loss, "steps": steps, "first_loss": first},
    )


def check_accumulation(build: Build) -> CheckResult:
    """A step in micro-batches is the step in one piece, and both are the mean's gradient, taken by hand."""
    parts, whole = build(), build()
    plan, state = parts.training.plan, parts.state
    rows = plan.micro_batches(state.step) * plan.micro_batch_size
    at_once = dataclasses.replace(whole.training, plan=constant_plan(plan.tokens_per_row, rows))
    by_hand = build()
    batch = step_batch(by_hand)
    mean = by_hand.training.loss(batch.ids, batch.targets) / batch.targets.numel()
    mean.backward()  # type: ignore[no-untyped-call]
    expected = {name: each.grad for name, each in by_hand.state.model.named_parameters()}
    steps = [measure_step(parts), measure_step(SetUp(whole.state, at_once))]
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
        f"is {ratio:.3g} times that of one piece): nats and gradients are to be added up, and divided once "
        "by ALL tokens of the step; look at gradients.py and at train_step in trainer.py",
        figures={f"{name}_relative_difference": each for name, each in off.items()} | {"norm_ratio": ratio},
    )


def _name_some(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- do two ways to compute the same agree? compiled and not, in 16 bits and 32, by one process


# Relative, of the loss and of the gradient, by precision. In float32 only sums are in another order. In 16
# bits the loss may be off by a unit or two in the last place (2^-8 of bfloat16, 2^-11 of float16), and the
# gradient by the roundings of a dozen products in a row.
TOLERANCES = {
    "fp32": (1e-5, 1e-3),
    "tf32": (1e-3, 2e-2),
    "fp16": (1e-3, 2e-2),
    "bf16": (4e-3, 1e-1),
}
PROCESSES_TOLERANCE = 1e-4  # of the losses and norms of the first steps; seen: 1e-7


def check_compiled(build: Build) -> CheckResult:
    """The compiled step's loss and gradient against those of the same step, not compiled."""
    return _compare(
        measure_pass(build(compile=True)),
        measure_pass(build()),
        "fp32",
        "torch.compile makes another computation of the step: try a newer torch, or give --compile False; "
        "if it was changed, look at what build_loss in parallel.py compiles",
    )


def check_precision(build: Build, precision: str) -> CheckResult:
    """Loss and gradient in the recipe's precision against those in float32."""
    return _compare(
        measure_pass(build(precision=precision)),
        measure_pass(build()),
        precision,
        f"something is rounded to {precision} that must stay in float32: sums, layer norms, the softmax, the "
        "loss (loss.py), the weights themselves (parallel.py); or this device computes it badly: try "
        "--precision fp32",
    )


def _compare(found: Step, expected: Step, precision: str, cause: str) -> CheckResult:
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


Steps = Sequence[tuple[float, float]]
"""Loss and gradient norm of the first steps."""


def check_processes(train_alone: Callable[[], Steps], train_in_two: Callable[[], Steps]) -> CheckResult:
    """The first steps of one process against the same steps divided among two, which talk through gloo."""
    alone, together = train_alone(), train_in_two()
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
        cause="two processes do not take the steps that one takes (loss "
        f"{loss_of_two:.5f} instead of {loss:.5f}, gradient norm {norm_of_two:.5g} instead of {norm:.5g}): "
        "gradients and nats are to be SUMMED over processes once a step, before clipping (gradients.py, "
        "World.all_reduce), and each process has its own micro-batches (batching.py)",
        figures={"relative_difference": off},
    )


# ---------------------------------------------------------------- is what is saved what comes back? weights, moments, step, to the bit


STEPS = 2


def check_saving(build: Build, folder: Path) -> CheckResult:
    """Train a little, save into `folder`, load into another state: all that training changes is the same."""
    saved, loaded = build(), build()
    for _ in range(STEPS):
        step_module.train_step(saved.state, saved.training)
    written = save.save_checkpoint(saved.state, folder)
    load.load_checkpoint(loaded.state, written)
    faults = _compare_runs(saved.state, loaded.state)
    parameters = len(dict(saved.state.model.named_parameters()))
    return CheckResult(
        passed=not faults,
        measured="the same to the bit" if not faults else f"{len(faults)} differ",
        bound=f"{parameters} weights, moments, step",
        cause=f"a run that is resumed would not go on as it was: {'; '.join(faults[:3])}; look at "
        "save_checkpoint and load_checkpoint in the folder checkpoint",
        figures={"differences": len(faults)},
    )


def _compare_runs(saved: TrainState, loaded: TrainState) -> list[str]:
    """What is not the same, in words."""
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


# ---------------------------------------------------------------- one step of a set-up, looked at closely


class Step(NamedTuple):
    """What one step did."""

    loss: float
    """Nats per token."""
    grad_norm: float
    gradients: Mapping[str, Tensor | None]
    """By parameter, of the mean over the step's tokens, not clipped."""


def step_batch(setup: SetUp) -> Batch:
    """All rows of the step that a set-up is at, in one batch."""
    plan, step = setup.training.plan, setup.state.step
    first, rows = plan.rows(step, 0)
    return setup.training.data.batch(first, rows * plan.micro_batches(step))


class _OneBatch:
    """The same batch again and again."""

    def __init__(self, row: Batch) -> None:
        self._row = row

    def batch(self, _first_row: int, _rows: int) -> Batch:
        """It."""
        return self._row


class _RecordedReduction(Replicated):
    """The reduction of a set-up, with a copy of what it leaves in the gradients."""

    def __init__(self, setup: SetUp) -> None:
        self._setup = setup
        self.gradients: dict[str, Tensor | None] = {}

    def reduce(self, nats: Tensor, number: int, count: int) -> Tensor:
        """As the set-up does it."""
        total = self._setup.training.sharing.reduce(nats, number, count)
        if number == count - 1:
            named = self._setup.state.model.named_parameters()
            self.gradients = {name: None if each.grad is None else each.grad.clone() for name, each in named}
        return total

    def publish(self) -> None:
        """As the set-up does it."""
        self._setup.training.sharing.publish()


def measure_step(setup: SetUp) -> Step:
    """Do the step, as a run does it."""
    recorded = _RecordedReduction(setup)
    training = dataclasses.replace(setup.training, sharing=recorded)
    result = step_module.train_step(setup.state, training)
    return Step(result.loss, result.grad_norm, recorded.gradients)


def compare_gradients(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """The norm of the difference, all parameters together, as a share of the expected norm."""
    off = whole = 0.0
    for name, wanted in expected.items():
        given = found[name]
        wanted_or_zero = torch.zeros(()) if wanted is None else wanted.double()
        given_or_zero = torch.zeros(()) if given is None else given.double()
        off += float((given_or_zero - wanted_or_zero).square().sum())
        whole += float(wanted_or_zero.square().sum())
    return float((off / max(whole, 1e-300)) ** 0.5)


def measure_pass(setup: SetUp) -> Step:
    """One micro-batch forward and backward, and no update."""
    batch = setup.training.data.batch(*setup.training.plan.rows(setup.state.step, 0))
    nats, scaler = setup.training.loss(batch.ids, batch.targets), setup.state.scaler
    scaler.scale(nats / batch.targets.numel()).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: None if each.grad is None else each.grad / scaler.get_scale()
        for name, each in setup.state.model.named_parameters()
    }
    norms = [each.norm() for each in gradients.values() if each is not None]
    return Step(nats.item() / batch.targets.numel(), float(torch.stack(norms).norm()), gradients)


# ---------------------------------------------------------------- two processes on this machine that run one line of python each, started as torchrun starts


# Each keeps what it says in a file of its own: torch's agent would leave the files open that it redirects to.
INTO_FILE = (
    "import os, sys; log = os.open(f'{sys.argv.pop()}/{os.getpid()}', os.O_CREAT | os.O_WRONLY); "
    "os.dup2(log, 1); os.dup2(log, 2); "
)


def run_in_two(line: str, words: Sequence[str], logs: Path) -> None:
    """Run `line`, with `words` in sys.argv, in two processes that may meet through gloo.

    Raises RuntimeError, with the last thing it said, if one fails. Nothing of what they say is shown; it is
    written into the folder `logs`.
    """
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)  # what is raised says it all
    said = logs / "said"
    said.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-c", INTO_FILE + line, *words, str(said))
    except ChildFailedError as error:
        failures = error.failures
        rank = min(failures, key=lambda each: (failures[each].exitcode < 0, failures[each].timestamp))
        words_of_it = _last_words(said / str(failures[rank].pid))
        raise RuntimeError(f"process {rank} of two failed: {words_of_it}") from None
    finally:
        elastic.setLevel(level)


def _last_words(path: Path) -> str:
    said = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
