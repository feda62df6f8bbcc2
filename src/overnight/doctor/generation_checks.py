"""Checks of generation: the key-value cache, the causal mask, a reference implementation.

Shapes: B rows, T positions, V ids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from overnight.doctor.check import CheckResult, skipped
from overnight.generation import SamplingConfig, generate
from overnight.model.gpt import GPT, eval_mode
from overnight.run.setup import RunSetup

LOGIT_TOLERANCE = 1e-3  # in float32; observed: 0
REFERENCE_TOLERANCE = 1e-4  # of the largest logit, in float32; README.md has 1.4e-6 of GPT-2 124M


def check_generation(run: RunSetup) -> CheckResult:
    """Greedy generation with the key-value cache picks the most likely ids of the model without a cache.

    Two prompts of different lengths, so that one is padded, to the end of the context.
    """
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
    worst = max(behind)
    return CheckResult(
        passed=all(each <= LOGIT_TOLERANCE for each in behind),
        measured=f"a logit off by {worst:.1e}",
        bound=f"{LOGIT_TOLERANCE:.0e}, {new} ids of 2 prompts",
        cause="with the key-value cache, ids are generated that are not the most likely ones without it: a "
        "position is off by one, a key or value is written to the wrong index, or padding is attended to; "
        "look at KVCache in generate.py",
        figures={"logit_difference": worst},
    )


def check_causality(run: RunSetup) -> CheckResult:
    """Changing an id changes no logit before it, and all logits from there on."""
    model = run.state.model
    ids_T = run.training.data.batch(0, 1).ids[0].tolist()
    T = len(ids_T)
    position = T // 2
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


@torch.no_grad()
def _logits(model: GPT, ids_T: list[int]) -> Tensor:
    """(T, V), without a cache."""
    with eval_mode(model):
        logits_BTV: Tensor = model(torch.tensor([ids_T], device=model.wte.weight.device))
    return logits_BTV[0].float()


@torch.no_grad()
def check_reference(model: GPT, folder: Path) -> CheckResult:
    """The logits of `model` are those that Transformers computes for the same folder and ids."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return skipped("Transformers is not installed: pip install transformers")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in evaluation mode
    T = min(model.config.context_length, 64)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.vocab_size, (2, T), generator=generator)
    with eval_mode(model):
        ours_BTV = model(ids_BT.to(model.wte.weight.device)).float().cpu()
    expected_BTV = theirs(ids_BT).logits.float()
    off = float((ours_BTV - expected_BTV).abs().max())
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
