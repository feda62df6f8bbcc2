"""A few numbers about a model's weights, in which mistakes show that its loss hides."""

from __future__ import annotations

import math

import torch

from overnight.model.gpt import GPT
from overnight.state import own_rows
from overnight.world import World

NORM_GAINS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
INTO_RESIDUAL = ("attn.c_proj.weight", "mlp.c_proj.weight")
BESIDE_RESIDUAL = ("mlp.c_fc.weight",)


@torch.no_grad()
def describe_weights(model: GPT, world: World) -> dict[str, float]:
    """The mean gain of all layer norms, and the residual ratio.

    That is the standard deviation of the weights that write into the residual stream by that of c_fc's: at
    the start 1 / sqrt(2 n_layer). All processes must call it, for of shards each adds up its own.
    """
    kinds = (NORM_GAINS, INTO_RESIDUAL, BESIDE_RESIDUAL)
    sums = torch.zeros(len(kinds), 3, device=model.wte.weight.device)
    for name, parameter in model.named_parameters():
        for kind, endings in enumerate(kinds):
            if name.endswith(endings):
                rows = own_rows(parameter.detach())[0].float()
                sums[kind] += torch.stack([sums.new_tensor(rows.numel()), rows.sum(), rows.square().sum()])
    world.sum([sums])
    gains, into, beside = sums.cpu().tolist()
    ratio = _deviation(into) / (
        _deviation(beside) or math.nan
    )  # weights of which nothing is left but infinity
    return {"norm_gain": gains[1] / gains[0], "residual_ratio": ratio}


def _deviation(sums: list[float]) -> float:
    """The standard deviation, from (count, sum, sum of squares)."""
    count, total, squares = sums
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
