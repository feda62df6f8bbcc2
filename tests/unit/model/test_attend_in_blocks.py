"""Attention in blocks of queries, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model import kernels
from overnight.model.kernels import QUERIES, attend_in_blocks

TOLERANCE = 0.01  # bfloat16 keeps 8 bits: each of a few roundings is off by at most 0.4%


def parts(B: int, H: int, T: int, D: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B * T + D)
    stored = (torch.randn(B, T, H, D, generator=generator) for _ in range(3))
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in stored]  # as the model lays them out


def naive(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    T, D = q_BHTD.shape[2:]
    scores = q_BHTD @ k_BHTD.transpose(2, 3) / D**0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1) @ v_BHTD


def off_by(ours: Tensor, truth: Tensor) -> float:
    return (ours.detach().double() - truth.detach()).norm().item() / truth.detach().norm().item()


def errors(T: int, attend: Callable[..., Tensor] = attend_in_blocks) -> list[float]:
    """How far the output and the three gradients are from those of float64, relative to their size."""
    inputs = parts(2, 3, T, 16)
    ours = attend(*inputs, is_causal=True)
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    truth = naive(*doubles)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((ours.float() * weight).sum(), inputs)
    true_gradients = torch.autograd.grad((truth * weight).sum(), doubles)
    return [off_by(*pair) for pair in zip([ours, *gradients], [truth, *true_gradients], strict=True)]


@pytest.mark.parametrize("T", [2, 127, QUERIES, QUERIES + 1, 3 * QUERIES - 5])
def test_output_and_gradients_equal_the_definition(T):
    assert max(errors(T)) < TOLERANCE


def test_comparison_detects_a_look_at_the_future(monkeypatch):
    monkeypatch.setattr(
        kernels, "_causal_bias", lambda queries, dtype: torch.zeros(queries, queries, dtype=dtype)
    )
    assert max(errors(200)) > 10 * TOLERANCE


def test_blocks_are_as_exact_as_torch_s_kernel():
    assert errors(300)[0] < 2 * errors(300, F.scaled_dot_product_attention)[0]


@pytest.mark.parametrize("case", ["fp32", "mask", "not causal", "evaluated"])
def test_unsupported_call_goes_to_torch(case):
    q, k, v = parts(1, 2, 8, 16, torch.float32 if case == "fp32" else torch.bfloat16)
    mask = torch.ones(8, 8, dtype=torch.bool).tril(2) if case == "mask" else None
    causal = case in {"fp32", "evaluated"}
    with torch.set_grad_enabled(case != "evaluated"):
        ours = attend_in_blocks(q, k, v, attn_mask=mask, is_causal=causal)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))


def test_torch_can_trace_and_differentiate_blocks():
    inputs = [part.flatten(0, 1).contiguous().detach().requires_grad_() for part in parts(1, 2, 150, 16)]
    torch.library.opcheck(torch.ops.overnight.attend_in_blocks.default, tuple(inputs), atol=0.05, rtol=0.05)
