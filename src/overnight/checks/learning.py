"""Does it learn? The loss it begins with, the gradients, one batch by heart, a step in parts.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from overnight import trainer
from overnight.batching import constant_plan
from overnight.checks.check import Build, Finding, SetUp
from overnight.checks.steps import compare_gradients, measure_step, step_batch
from overnight.data.stream import Batch
from overnight.loss import LossSum

INITIAL_STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: of the embedding, and so of the head
INITIAL_TOLERANCE = 0.1  # nats, beside the spread of a logit: text is not drawn evenly from the vocabulary
OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_NATS = 200, 32, 0.1
ROUNDING = 1e-4  # of float32 sums in another order, relative; seen: 1e-7


def check_initial_loss(setup: SetUp) -> Finding:
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
    return Finding(
        passed=abs(loss - expected) <= tolerance,
        measured=f"{loss:.3f} nats",
        bound=f"{expected:.3f} ± {tolerance:.2f} (ln V and a little)",
        cause=f"the loss before the first step is {side} than chance: {cause}",
        figures={"loss": loss, "expected": expected, "tolerance": tolerance},
    )


def check_gradients(setup: SetUp) -> Finding:
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
    return Finding(
        passed=not wrong,
        measured=f"{len(named) - len(wrong)} of {len(named)}",
        bound="all finite, none zero, all updated",
        cause="; ".join(found),
        figures={"parameters": len(named), "sound": len(named) - len(wrong)},
    )


def check_overfit(setup: SetUp) -> Finding:
    """The beginning of a row, seen again and again, is known by heart: the whole machinery learns.

    At a learning rate that suits so small a model: 23 to 55 steps were seen to do, from 16 to 128 channels.
    """
    row = setup.training.batches(0, 1)
    row = Batch(row.ids[:, :OVERFIT_TOKENS], row.targets[:, :OVERFIT_TOKENS])
    rate = min(1e-2, 0.4 / setup.state.model.config.n_embd)
    training = dataclasses.replace(
        setup.training,
        batches=lambda _first_row, _rows: row,
        plan=constant_plan(row.ids.shape[1], rows_per_micro_batch=1),
        learning_rate=lambda _step: rate,
    )
    first = loss = math.inf
    steps = 0
    while steps < OVERFIT_STEPS and not loss < OVERFIT_NATS / 2:
        loss = trainer.train_step(setup.state, training).loss
        first = loss if steps == 0 else first
        steps += 1
        if not math.isfinite(loss):
            break
    return Finding(
        passed=loss <= OVERFIT_NATS,
        measured=f"{loss:.3f} nats after {steps} steps",
        bound=f"at most {OVERFIT_NATS} (from {first:.2f})",
        cause="a model that can't learn one row by heart learns nothing: the optimizer does not move the "
        "weights by their gradients (optim.py, its settings in the recipe: beta1, beta2, epsilon, "
        "max_grad_norm), or the loss is of other tokens than the gradient",
        figures={"loss": loss, "steps": steps, "first_loss": first},
    )


def check_accumulation(build: Build) -> Finding:
    """A step in micro-batches is the step in one piece, and both are the mean's gradient, taken by hand."""
    parts, whole = build(), build()
    plan, state = parts.training.plan, parts.state
    rows = plan.micro_batches(state.step) * plan.rows_per_micro_batch
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
    return Finding(
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
