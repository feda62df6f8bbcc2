"""Every part beyond GPT-2 against Transformers' module, or a naive twin: outputs, gradients, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from overnight.model.feed_forward import FeedForward, MixtureOfExperts
from overnight.model.model_config import ModelConfig
from overnight.model.norms import build_norm
from overnight.model.positions import RotaryPositions, Rotation, rotary_frequencies, rotate
from twins import (
    ROTARY,
    YARN,
    B,
    C,
    Case,
    Function,
    T,
    Weights,
    call,
    draw,
    draw_for,
    llama_config,
    rotate_neighbours,
    turn,
    twin_tests,
    wrong,
)

# ---------------------------------------------------------------- positions and norms


def rotate_backwards(x: Tensor, rotation: Rotation) -> Tensor:
    return rotate(x, Rotation(rotation.cosine, -rotation.sine))


def rotary(config: ModelConfig = ROTARY) -> Case:
    def theirs(w: Weights) -> Tensor:
        cos, sin = llama.LlamaRotaryEmbedding(llama_config(config))(w["x"], torch.arange(T)[None])
        return llama.apply_rotary_pos_emb(w["x"], w["x"], cos, sin)[0]

    def late(w: Weights) -> Tensor:
        return rotate(w["x"], RotaryPositions(config)(w["x"], torch.arange(1, T + 1))[1])

    mistakes = {
        "neighbouring pairs": lambda w: rotate_neighbours(w["x"], turn(config)),
        "the other way": lambda w: rotate_backwards(w["x"], turn(config)),
        "positions from 1": late,
        "another base": lambda w: rotate(w["x"], turn(replace(config, rotary_base=5000.0))),
    }
    if config.rotary_scaling == "yarn":
        mistakes["no magnitude"] = lambda w: rotate(w["x"], turn(config)) / RotaryPositions(config).magnitude
        mistakes["every pair stretched"] = wrong(
            "positions._ramp", lambda config: torch.ones(8), lambda w: rotate(w["x"], turn(config))
        )
    return Case({"x": draw(1, B, 4, T, 16)}, lambda w: rotate(w["x"], turn(config)), theirs, mistakes)


def yarn() -> Case:
    return rotary(YARN)


def rms_norm() -> Case:
    norm = build_norm(replace(ROTARY, normalization="rms"), C)
    weights = draw_for(norm, x=1e-3 * draw(1, B, T, C))  # so small that epsilon counts
    theirs = llama.LlamaRMSNorm(C, eps=1e-6)
    mistakes = {
        "epsilon": lambda w: call(llama.LlamaRMSNorm(C, eps=1e-8), w, w["x"]),
        "mean subtracted": lambda w: call(theirs, w, w["x"] - w["x"].mean(-1, keepdim=True)),
    }
    return Case(weights, lambda w: call(norm, w, w["x"]), lambda w: call(theirs, w, w["x"]), mistakes)


# ---------------------------------------------------------------- feed-forward


def halves_swapped(wide: Tensor, _activation: str) -> Tensor:
    up, gate = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu() -> Case:
    config = replace(ROTARY, activation="swiglu", feed_forward_width=80)
    ours: Function = lambda w: call(FeedForward(config), w, w["x"])  # noqa: E731

    def twin(w: Weights) -> Tensor:
        gate, up = w["c_fc.weight"].chunk(2)
        own = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": w["c_proj.weight"]}
        return call(llama.LlamaMLP(llama_config(config)), own, w["x"])

    gelu_gate = lambda wide, _: F.gelu(wide[..., :80]) * wide[..., 80:]  # noqa: E731
    mistakes = {
        "gate and up swapped": wrong("feed_forward.activate", halves_swapped, ours),
        "GELU in the gate": wrong("feed_forward.activate", gelu_gate, ours),
    }
    return Case(draw_for(FeedForward(config), x=draw(1, B, T, C)), ours, twin, mistakes)


def relu2() -> Case:
    part = FeedForward(replace(ROTARY, activation="relu2", biases=True))

    def twin(w: Weights, square: Callable[[Tensor], Tensor] = lambda z: z.clamp(min=0) ** 2) -> Tensor:
        return square(w["x"] @ w["c_fc.weight"].T + w["c_fc.bias"]) @ w["c_proj.weight"].T + w["c_proj.bias"]

    mistakes = {
        "no square": lambda w: twin(w, F.relu),
        "the square of negative ones": lambda w: twin(w, torch.square),
    }
    return Case(draw_for(part, x=draw(1, B, T, C)), lambda w: call(part, w, w["x"]), twin, mistakes)


def experts(balance_rate: float | None = None) -> Case:
    """Transformers keeps gate and up in one tensor in our order, too."""
    config = replace(ROTARY, activation="swiglu", n_expert=8, experts_per_token=3, feed_forward_width=32)
    part = MixtureOfExperts(replace(config, balance_rate=balance_rate))
    others = {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "experts_implementation": "eager",
    }
    ours: Function = lambda w: call(part, w, w["x"])  # noqa: E731

    def twin(w: Weights, **changed: object) -> Tensor:
        theirs = llama_config(config, Qwen3MoeConfig, **{"num_experts_per_tok": 3, **others, **changed})
        own = {
            "experts.gate_up_proj": w["c_fc"],
            "experts.down_proj": w["c_proj"],
            "gate.weight": w["router"],
        }
        return call(Qwen3MoeSparseMoeBlock(theirs), own, w["x"])

    mistakes = {
        "weights do not sum to 1": lambda w: twin(w, norm_topk_prob=False),
        "an expert fewer": lambda w: twin(w, num_experts_per_tok=2),
        "gate and up swapped": wrong("feed_forward.activate", halves_swapped, ours),
    }
    return Case(draw_for(part, x=draw(1, B, T, C)), ours, twin, mistakes)


def experts_without_balance() -> Case:
    return experts(0.0)


def shared_experts() -> Case:
    """One token and expert after the other. The bias decides the choice, and is no part of the weights."""
    config = replace(ROTARY, activation="relu2", n_expert=4, shared_experts=2, feed_forward_width=32)
    part, bias = MixtureOfExperts(config), torch.tensor([0.3, 0.0, -0.2, 0.1])
    part.balance.data.copy_(bias)

    def twin(w: Weights, shared: float = 1.0, chosen_by: float = 1.0, weighed_by: float = 0.0) -> Tensor:
        def expert(e: int, x: Tensor) -> Tensor:
            return w["c_proj"][e] @ (w["c_fc"][e] @ x).clamp(min=0) ** 2

        outputs = []
        for x in w["x"].flatten(0, 1):
            share = (w["router"] @ x).softmax(0)
            chosen = (share + chosen_by * bias).argsort(descending=True)[:2]
            weight = (share + weighed_by * bias)[chosen]
            routed = sum(p * expert(int(e), x) for p, e in zip(weight / weight.sum(), chosen, strict=True))
            outputs.append(routed + shared * (expert(4, x) + expert(5, x)))
        return torch.stack(outputs).view(B, T, C)

    mistakes = {
        "shared ones forgotten": lambda w: twin(w, shared=0.0),
        "shared ones averaged": lambda w: twin(w, shared=0.5),
        "bias forgotten": lambda w: twin(w, chosen_by=0.0),
        "bias in the weights": lambda w: twin(w, weighed_by=1.0),
    }
    return Case(draw_for(part, x=draw(1, B, T, C)), lambda w: call(part, w, w["x"]), twin, mistakes)


CASES: dict[str, Callable[[], Case]] = {
    "rotary": rotary,
    "yarn": yarn,
    "RMSNorm": rms_norm,
    "SwiGLU": swiglu,
    "ReLU2": relu2,
    "experts": experts,
    "experts without balance": experts_without_balance,
    "shared experts": shared_experts,
}


test_outputs_and_gradients_are_those_of_the_twin, test_comparison_finds_planted_mistakes = twin_tests(CASES)


@pytest.mark.parametrize(
    "trained, context, base", [(16, 64, 1e4), (1024, 8192, 1e4), (2048, 4096, 5e5), (8, 8, 1e4)]
)
def test_yarn_has_the_frequencies_and_the_magnitude_of_transformers(trained, context, base):
    config = replace(YARN, trained_context_length=trained, context_length=context, n_head=1, rotary_base=base)
    rope = {"factor": context / trained, "original_max_position_embeddings": trained, "rope_type": "yarn"}
    theirs = llama_config(config, rope_parameters={**rope, "rope_theta": base})
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    torch.testing.assert_close(torch.tensor(rotary_frequencies(config)), frequencies, rtol=1e-6, atol=0)
    assert RotaryPositions(config).magnitude == pytest.approx(magnitude, rel=1e-12)
    unscaled = replace(config, rotary_scaling="none", trained_context_length=None)
    is_equal = torch.equal(torch.tensor(rotary_frequencies(unscaled)), frequencies)
    assert is_equal == (trained == context)
