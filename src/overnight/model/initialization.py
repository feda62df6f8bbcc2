"""How GPT-2's weights begin: every parameter by exactly one rule."""

from __future__ import annotations

import math

import torch

from overnight.model.gpt import GPT

STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: initializer_range of every matrix


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw all weights of `model`, a pure function of its sizes and `seed` (on the CPU: of nothing else).

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 n_layer)), since
    2 n_layer of them add up there (GPT-2 paper, section 2.3); biases 0; layer norms 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = STANDARD_DEVIATION / math.sqrt(2 * model.config.n_layer)
    for name, weight in model.weights().items():
        if name.endswith("c_proj.weight"):
            weight.copy_(torch.empty(weight.shape).normal_(0.0, residual, generator=generator))
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            weight.copy_(torch.empty(weight.shape).normal_(0.0, STANDARD_DEVIATION, generator=generator))
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            weight.fill_(1.0)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            raise AssertionError(f"no rule initialises {name}")
    model.clear_padding()
