"""A part of the model, or all of it, beside its twin: how two of them are compared.

Both sides are functions of the same weights, under our names, so that their gradients compare as they are.
Where Transformers keeps a weight in another order, the twin reorders it. Each comparison must also find
planted mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig

from overnight.model.model_config import ModelConfig
from overnight.model.positions import RotaryPositions, Rotation

TOLERANCE, MISTAKE = 1e-5, 1e-3  # relative to the largest number of a tensor
B, T, C, V = 2, 40, 64, 61
Weights = dict[str, Tensor]
Function = Callable[[Weights], Tensor]
ROTARY = ModelConfig(
    n_layer=2, n_head=4, n_embd=C, context_length=64, vocab_size=V, positions="rotary", biases=False
)
YARN = replace(ROTARY, rotary_scaling="yarn", trained_context_length=16)
YARN_OF_TRANSFORMERS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
IDS_BT = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


@dataclass
class Case:
    """Two functions that must agree, and wrong ones that must not."""

    weights: Weights
    ours: Function
    twin: Function
    mistakes: dict[str, Function]


def evaluate(function: Function, weights: Weights) -> Weights:
    """The output of `function`, and the gradient of every weight it depends on."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    output = function(leaves)
    output.backward(draw(0, *output.shape))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), **found}


def difference(ours: Weights, theirs: Weights) -> float:
    """The largest difference of two numbers, as a share of the largest number of their tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_for(module: nn.Module, **more: Tensor) -> Weights:
    """Random weights for a module of ours, none at the 0 or 1 that would hide a mistake."""
    sizes = [(name, p.shape) for name, p in module.named_parameters() if name != "balance"]
    drawn = {name: draw(7 + i, *size) for i, (name, size) in enumerate(sizes)}
    scaled = {name: w / w.shape[-1] ** 0.5 if w.dim() > 1 else 1 + 0.3 * w for name, w in drawn.items()}
    return {**scaled, **more}


def call(module: nn.Module, weights: Weights, *inputs: object, **others: object) -> Tensor:
    """`module` with these weights; those that are not its own are inputs."""
    own = {name: weights[name] for name, _ in module.named_parameters() if name in weights}
    output = functional_call(module.eval(), own, inputs, others)
    return output[0] if isinstance(output, tuple) else output


def wrong(place: str, mistake: object, function: Function) -> Function:
    """`function` while the name `place` within overnight.model means `mistake`."""

    def call_wrongly(weights: Weights) -> Tensor:
        with patch(f"overnight.model.{place}", mistake):
            return function(weights)

    return call_wrongly


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotate_neighbours(x: Tensor, rotation: Rotation) -> Tensor:
    """As the paper writes it: pairs of channels 2 i and 2 i + 1."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = (table.chunk(2, dim=-1)[1] for table in rotation)
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)


def turn(config: ModelConfig) -> Rotation:
    return RotaryPositions(config)(torch.zeros(B, T, C), None)[1]


def llama_config(config: ModelConfig, kind: type = LlamaConfig, **others: object) -> LlamaConfig:
    """The same sizes for Transformers, eager attention."""
    rope = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rotary_scaling == "yarn":
        rope |= YARN_OF_TRANSFORMERS
    sizes = {
        **{"hidden_size": config.n_embd, "intermediate_size": config.hidden_width, "vocab_size": V},
        **{"num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head},
        **{"num_key_value_heads": config.kv_heads, "head_dim": config.head_channels},
        **{"max_position_embeddings": config.context_length, "rms_norm_eps": 1e-6, "rope_parameters": rope},
        **{"tie_word_embeddings": False, "attn_implementation": "eager"},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    }
    return kind(**{**sizes, **others})


def check_case(case: Case) -> None:
    """Fails unless outputs and all gradients agree."""
    found = evaluate(case.ours, case.weights)
    assert found.keys() == {"output", *case.weights}
    assert difference(found, evaluate(case.twin, case.weights)) <= TOLERANCE


def check_mistakes(case: Case) -> None:
    """Fails unless the comparison finds every mistake."""
    truth = evaluate(case.twin, case.weights)
    assert case.mistakes
    for mistake, function in case.mistakes.items():
        found = evaluate(function, case.weights)
        common = truth.keys() & found.keys()
        off = difference({name: found[name] for name in common}, {name: truth[name] for name in common})
        assert off > MISTAKE, mistake


def twin_tests(
    cases: Mapping[str, Callable[[], Case]],
) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """The two tests of a file: its twins agree, and the comparison finds the planted mistakes."""

    @pytest.mark.parametrize("name", cases)
    def agrees(name: str) -> None:
        check_case(cases[name]())

    @pytest.mark.parametrize("name", cases)
    def finds_mistakes(name: str) -> None:
        check_mistakes(cases[name]())

    return agrees, finds_mistakes
