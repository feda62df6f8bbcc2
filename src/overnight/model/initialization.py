"""How GPT-2's weights begin: every parameter by exactly one rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from overnight.model.config import ModelConfig
from overnight.model.gpt import GPT

STANDARD_DEVIATION = 0.02  # GPT-2's released code, model.py: initializer_range of every matrix


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw all weights of `model`: see `draw_weights`."""
    own = model.weights()
    shapes = {name: weight.shape for name, weight in own.items()}
    for name, weight in draw_weights(shapes, model.config.n_layer, seed):
        own[name].copy_(weight)
    model.clear_padding()


def draw_weights(shapes: Mapping[str, torch.Size], n_layer: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, one at a time, on the CPU: a pure function of the shapes and `seed`.

    Matrices N(0, 0.02); those that write into the residual stream N(0, 0.02 / sqrt(2 n_layer)), since
    2 n_layer of them add up there (GPT-2 paper, section 2.3); biases 0; layer norms 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = STANDARD_DEVIATION / math.sqrt(2 * n_layer)
    for name, shape in shapes.items():
        if name.endswith("c_proj.weight"):
            yield name, torch.empty(shape).normal_(0.0, residual, generator=generator)
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            yield name, torch.empty(shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            yield name, torch.ones(shape)
        elif name.endswith(".bias"):
            yield name, torch.zeros(shape)
        else:
            raise AssertionError(f"no rule initialises {name}")


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every weight by name, the embedding without its padding; takes no memory."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in GPT(config).weights().items()}
