"""Counts that follow from a model's sizes, against torch's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from overnight.model import ActivationCheckpointing
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.training import Compute
from overnight.training.compute import NextTokenLoss

SMALL = ModelConfig(n_layer=3, n_head=2, n_embd=32, context_length=64, vocab_size=100)
GPT2 = PRESETS["gpt2-124m"]


def count_flops(model: ModelConfig, activation_checkpointing: ActivationCheckpointing) -> tuple[float, float]:
    """(matrix products with weights, attention) of a step for each token, as torch counts them.

    It counts every dispatched operation, recomputed ones included; of attention seven products over the
    whole square, causal or not. It knows the GPUs' kernels only, so the CPU's get their formulas.
    """
    compute = Compute(device="cpu", precision="fp32", compile=False, attention="fused", loss="full")
    compute = dataclasses.replace(compute, activation_checkpointing=activation_checkpointing)
    loss = NextTokenLoss(GPT(model, seed=1), compute)
    ids_BT = torch.randint(model.vocabulary, (2, model.context_length))
    kernel: Any = torch.ops.aten
    formulas = {
        kernel._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
        kernel._scaled_dot_product_flash_attention_for_cpu_backward: lambda *grad_qkv, **_: (
            sdpa_backward_flop_count(*grad_qkv[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        loss(ids_BT, ids_BT).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if "attention" in str(operation))
    return (sum(counts.values()) - attention) / ids_BT.numel(), attention / ids_BT.numel()


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective", "block"])
def test_executed_flops_are_those_that_torch_counts(activation_checkpointing):
    products, attention = count_flops(SMALL, activation_checkpointing)
    causal = attention / 2  # half the square
    assert SMALL.executed_flops_per_token(activation_checkpointing) == products + causal


def test_torch_s_count_sees_sizes_and_recomputation():
    """The negative control of the test above."""
    counts = {
        count_flops(dataclasses.replace(SMALL, **changes), activation_checkpointing)
        for changes in ({}, {"n_layer": 2}, {"vocab_size": 150}, {"context_length": 32})
        for activation_checkpointing in ("none", "block")
    }
    assert len(counts) == 8


def test_gpt2_flops_are_the_published_ones():
    """By hand: 84.9 million weights in blocks and 38.6 million in the padded head; attention 7 L C T."""
    assert GPT2.flops_per_token() / 1e6 == pytest.approx(855.2, abs=0.05)  # nanoGPT's estimate_mfu
    products = 6 * (12 * 12 * 768**2 + 50304 * 768)
    assert products / 1e6 == pytest.approx(741.4, abs=0.05)
    executed = GPT2.executed_flops_per_token("none")
    assert (executed - products) / 1e6 == pytest.approx(66.1, abs=0.05)
    assert 524_288 * executed / 1e12 == pytest.approx(423.3, abs=0.05)
    assert GPT2.executed_flops_per_token("selective") == executed
    assert GPT2.executed_flops_per_token("block") == executed + 2 * 12 * (8 * 768**2 + 768 * 1024)


@pytest.mark.parametrize("sizes", [{"n_layer": 10**9}, {"n_embd": 12 * 10**8}, {"context_length": 10**20}])
def test_absurd_sizes_are_refused(sizes):
    (problem,) = ModelConfig(**sizes).problems()
    assert "parameters" in problem
    assert not any(preset.problems() for preset in PRESETS.values())
