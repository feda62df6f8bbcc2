"""Checks of a small model: initial loss, gradients, causality, overfitting, generation, checkpoints.

Shapes: B rows, T positions, V ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.doctor.check import CheckResult, skipped
from overnight.doctor.context import DoctorContext, step_batch
from overnight.generation import SamplingConfig, generate
from overnight.model.gpt import GPT, eval_mode
from overnight.model.initialization import HEAD_DEVIATION
from overnight.training import step as step_module
from overnight.training.batch import constant_plan
from overnight.training.checkpoint import load, save
from overnight.training.schedule import Schedule, ScheduleConfig
from overnight.training.state import TrainState

INITIAL_STANDARD_DEVIATION = 0.02  # of the embedding and the tied head (GPT-2's released code, model.py)
INITIAL_TOLERANCE = 0.1  # nats, besides the spread of a logit: ids of a text are not uniform
OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_NATS = 200, 32, 0.1
SAVED_STEPS = 2
NAMED = 3  # parameters named per fault
LOGIT_TOLERANCE = 1e-3  # in float32; observed: 0
REFERENCE_TOLERANCE = 1e-4  # of the largest logit, in float32; README.md has 1.4e-6 of GPT-2 124M


def check_initial_loss(context: DoctorContext) -> CheckResult:
    """The loss before the first step is what GPT-2's initialisation gives.

    A hidden state after a normalization has C channels of variance 1, so that its product with a row of the
    embedding, N(0, 0.02), has variance s^2 = 0.02^2 C; an output layer of its own begins smaller. The logits
    are nearly normal: the mean of their log-sum-exp is ln V + s^2 / 2, and that of the target's logit is 0.
    """
    run = context.tiny_run.build()
    model, batch = run.state.model, step_batch(run)
    with torch.no_grad():
        loss = run.training.loss(batch.ids, batch.targets).item() / batch.targets.numel()
    deviation = INITIAL_STANDARD_DEVIATION if model.config.tied_head else HEAD_DEVIATION
    spread = deviation * math.sqrt(model.config.n_embd)
    expected = math.log(model.vocab_size) + spread**2 / 2
    tolerance = INITIAL_TOLERANCE + spread
    cause = (
        "higher than chance: weights with too large a standard deviation make a model too confident: "
        "look at the initialisation in model/gpt.py, and at what is summed in model/loss.py"
        if loss > expected
        else "lower than chance: an untrained model can't know the text: are targets the NEXT ids "
        "(data/loader.py), is the sum of nats divided twice, is the head tied?"
    )
    return CheckResult(
        passed=abs(loss - expected) <= tolerance,
        measured=f"{loss:.3f} nats",
        bound=f"{expected:.3f} ± {tolerance:.2f} (ln V and a little)",
        cause=f"the loss before the first step is {cause}",
        figures={"loss": loss, "expected": expected, "tolerance": tolerance},
    )


def check_gradients(context: DoctorContext) -> CheckResult:
    """Every parameter gets a gradient that is finite and not zero, and is updated by the optimizer."""
    run = context.tiny_run.build()
    batch = step_batch(run)
    run.training.loss(batch.ids, batch.targets).backward()  # type: ignore[no-untyped-call]
    updated = {id(each) for group in run.state.optimizer.param_groups for each in group["params"]}
    parameters = dict(run.state.model.named_parameters())
    faulty = defaultdict(list)
    for name, parameter in parameters.items():
        if fault := _gradient_fault(parameter, is_updated=id(parameter) in updated):
            faulty[fault].append(name)
    causes = []
    for fault, names in faulty.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        causes.append(f"{', '.join(names[:NAMED])}{more} {fault}")
    sound = len(parameters) - sum(map(len, faulty.values()))
    return CheckResult(
        passed=not faulty,
        measured=f"{sound} of {len(parameters)}",
        bound="all finite, none zero, all updated",
        cause="; ".join(causes),
        figures={"parameters": len(parameters), "sound": sound},
    )


def _gradient_fault(parameter: Tensor, *, is_updated: bool) -> str:
    if parameter.grad is None:
        return "gets no gradient: it is frozen, or cut off by a detach() between it and the loss"
    if not parameter.grad.isfinite().all():
        return "gets a gradient that is not finite: look for a division by zero or an overflow"
    if not parameter.grad.any():
        return "gets a gradient of zeros: its output does not reach the loss"
    if not is_updated:
        return "is in no parameter group of the optimizer, and so never updated: look at optim.py"
    return ""


def check_causality(context: DoctorContext) -> CheckResult:
    """Changing an id changes no logit before it, and all logits from there on."""
    run = context.tiny_run.build()
    model = run.state.model
    ids_T = run.training.data.batch(0, 1).ids[0].tolist()
    position = len(ids_T) // 2
    changed_T = [*ids_T]
    changed_T[position] = (ids_T[position] + 1) % model.vocab_size
    off_T = (_logits(model, changed_T) - _logits(model, ids_T)).abs().amax(dim=1)
    before = float(off_T[:position].max()) if position else 0.0
    after = float(off_T[position:].min())
    cause = (
        "an id changes logits BEFORE it: the attention mask lets the future through (is_causal in "
        "model/gpt.py); the loss then falls far below what is possible, and generated text is nonsense"
        if before > LOGIT_TOLERANCE
        else "an id does not change the logits after it: attention does not look back, or ids do not reach "
        "the model; look at the mask in model/gpt.py"
    )
    return CheckResult(
        passed=before <= LOGIT_TOLERANCE and after > 0.0,
        measured=f"before it {before:.1e}",
        bound=f"{LOGIT_TOLERANCE:.0e}; from it on, not 0",
        cause=cause,
        figures={"change_before": before, "least_change_after": after},
    )


class RepeatedRow(NamedTuple):
    """A row that is read whatever row is requested."""

    row: Batch

    def batch(self, _first_row: int, _rows: int) -> Batch:
        """Always the same row."""
        return self.row


def check_overfit(context: DoctorContext) -> CheckResult:
    """Training on the beginning of one row, repeated, brings its loss near 0.

    Uses a learning rate for small models; 23 to 55 steps were enough for 16 to 128 channels.
    """
    run = context.tiny_run.build()
    row = run.training.data.batch(0, 1)
    row = Batch(row.ids[:, :OVERFIT_TOKENS], row.targets[:, :OVERFIT_TOKENS])
    plan = constant_plan(row.ids.shape[1], micro_batch_size=1)
    constant = ScheduleConfig(total_steps=OVERFIT_STEPS, learning_rate_decay="constant")
    rate = min(1e-2, 0.4 / run.state.model.config.n_embd)
    schedule = Schedule(constant, rate, plan, OVERFIT_STEPS)
    training = dataclasses.replace(run.training, data=RepeatedRow(row), plan=plan, schedule=schedule)
    losses: list[float] = []
    for _ in range(OVERFIT_STEPS):
        losses.append(step_module.train_step(run.state, training).loss)
        if losses[-1] < OVERFIT_NATS / 2 or not math.isfinite(losses[-1]):
            break
    return CheckResult(
        passed=losses[-1] <= OVERFIT_NATS,
        measured=f"{losses[-1]:.3f} nats after {len(losses)} steps",
        bound=f"at most {OVERFIT_NATS} (from {losses[0]:.2f})",
        cause="a model that can't memorize one row learns nothing: the optimizer does not apply gradients "
        "(optim.py, its settings in the recipe: beta1, beta2, epsilon, max_grad_norm), or the loss and the "
        "gradient are of different tokens",
        figures={"loss": losses[-1], "steps": len(losses), "first_loss": losses[0]},
    )


def check_generation(context: DoctorContext) -> CheckResult:
    """Greedy generation with the key-value cache picks the most likely ids of the model without a cache.

    Two prompts of different lengths, so that one is padded, to the end of the context.
    """
    run = context.tiny_run.build()
    model = run.state.model
    T = model.config.context_length
    ids_T = run.training.data.batch(0, 1).ids[0].tolist()
    prompts = [ids_T[: max(1, T // 2)], ids_T[: max(1, T // 4)]]
    new = T - len(prompts[0])
    decoding = generate.Decoding(max_new_tokens=new, sampling=SamplingConfig(temperature=0.0, top_k=None))
    behind: list[float] = []
    for prompt, generated in zip(prompts, generate.generate(model, prompts, decoding), strict=True):
        logits_TV = _logits(model, [*prompt, *generated][:-1])[len(prompt) - 1 :]
        chosen_T = logits_TV.gather(1, torch.tensor(generated, device=logits_TV.device)[:, None])[:, 0]
        behind += (logits_TV.amax(dim=1) - chosen_T).tolist()
    return CheckResult(
        passed=all(each <= LOGIT_TOLERANCE for each in behind),
        measured=f"a logit off by {max(behind):.1e}",
        bound=f"{LOGIT_TOLERANCE:.0e}, {new} ids of 2 prompts",
        cause="with the key-value cache, ids are generated that are not the most likely ones without it: a "
        "position is off by one, a key or value is written to the wrong index, or padding is attended to; "
        "look at KVCache in generate.py",
        figures={"logit_difference": max(behind)},
    )


@torch.no_grad()
def _logits(model: GPT, ids_T: list[int]) -> Tensor:
    """(T, V), without a cache."""
    with eval_mode(model):
        logits_BTV: Tensor = model(torch.tensor([ids_T], device=model.wte.weight.device))
    return logits_BTV[0].float()


def check_saving(context: DoctorContext) -> CheckResult:
    """A checkpoint loaded into another state gives bitwise equal weights, moments and step."""
    run, loaded = context.tiny_run.build(), context.tiny_run.build().state
    for _ in range(SAVED_STEPS):
        step_module.train_step(run.state, run.training)
    written = save.save_checkpoint(run.state, context.scratch / "checkpoints")
    load.load_checkpoint(loaded, written)
    saved, restored = _contents_of(run.state), _contents_of(loaded)
    faults = [f"{name} is lost" for name in saved if name not in restored]
    faults += [
        f"{name} differs by {(restored[name] - value).abs().max():.1e}"
        for name, value in saved.items()
        if name in restored and not torch.equal(restored[name], value)
    ]
    parameters = len(list(loaded.model.parameters()))
    return CheckResult(
        passed=not faults,
        measured="bitwise equal" if not faults else f"{len(faults)} differ",
        bound=f"{parameters} weights, moments, step",
        cause=f"a resumed run would differ: {'; '.join(faults[:3])}; look at save_checkpoint and "
        "load_checkpoint in training/checkpoint",
        figures={"differences": len(faults)},
    )


def _contents_of(state: TrainState) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by its name in messages."""
    found = {"the step": torch.tensor(state.step)}
    for name, weight in state.model.named_parameters():
        found[f"the weight {name}"] = weight.detach()
        for moment, value in state.optimizer.state.get(weight, {}).items():
            whose = "AdamW's" if moment.startswith("exp_avg") else "Muon's"
            found[f"{whose} {moment} of {name}"] = torch.as_tensor(value)
    return found


@torch.no_grad()
def check_reference(context: DoctorContext) -> CheckResult:
    """The logits of `--baseline` are those that Transformers computes for the same folder and ids."""
    if context.baseline is None:
        return skipped("no model was given: --baseline gpt2, or a Hugging Face folder")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return skipped("Transformers is not installed: pip install transformers")
    model, folder = context.baseline.model, context.baseline.origin
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # both in evaluation mode
    T = min(model.config.context_length, 64)
    ids_BT = torch.randint(model.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    expected_BTV = theirs(ids_BT).logits.float()
    off = float((model(ids_BT).float() - expected_BTV).abs().max())
    largest = float(expected_BTV.abs().max())
    return CheckResult(
        passed=off <= REFERENCE_TOLERANCE * max(1.0, largest),
        measured=f"logits off by {off:.1e}",
        bound=f"{REFERENCE_TOLERANCE:.0e} of {largest:.3g}, {ids_BT.numel()} ids",
        cause=f"the logits of {folder.name} are not those of Transformers: the architecture is no longer "
        "GPT-2's (tanh GELU, layer norms, learned positions, the tied head: model/gpt.py), or the weights "
        "are read wrongly (conversion/huggingface.py)",
        figures={"logit_difference": off, "largest_logit": largest},
    )
