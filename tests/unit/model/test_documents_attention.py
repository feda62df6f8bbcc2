"""Attention within documents, against a naive twin: each document alone, through the plain model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from overnight.model.gpt import GPT
from overnight.model.kernels import (
    attend_with_mask,
    attend_within_documents,
    build_block_mask,
    find_documents,
)
from overnight.model.loss import cross_entropy_nats
from overnight.model.model_config import ModelConfig
from overnight.training import Compute, ComputeConfig
from overnight.training.compute import NextTokenLoss, describe_attention_kernel, resolve_compute

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=64, context_length=24, vocab_size=30)
END_OF_TEXT = 29
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def small_model() -> GPT:
    model = GPT(SMALL, seed=1)
    with torch.no_grad():  # so that positions and attention count for something
        for weight in (model.wpe.weight, *(block.attn.c_attn.weight for block in model.h)):
            weight.mul_(10)
    return model


def rows() -> Tensor:
    """Rows that begin with a rest or a document, with long documents, empty ones, and none at all."""
    ids_BT = torch.randint(END_OF_TEXT, (5, 24), generator=torch.Generator().manual_seed(0))
    for row, begins in enumerate([(0, 9), (5, 6, 7, 20), (23,), (), (0, 1, 2, 12)]):
        ids_BT[row, list(begins)] = END_OF_TEXT
    return ids_BT


def documents_of(ids_T: Tensor) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    begins = [index for index, id in enumerate(ids_T.tolist()) if id == END_OF_TEXT and index]
    return list(pairwise([0, *begins, len(ids_T)]))


def alone(model: GPT, ids_BT: Tensor) -> Tensor:
    """Logits of each document by itself."""
    logits = [model(ids_T[None, start:end])[0] for ids_T in ids_BT for start, end in documents_of(ids_T)]
    return torch.cat(logits).view(*ids_BT.shape, -1)


def gradients(model: GPT, nats: Callable[[], Tensor]) -> Tensor:
    model.zero_grad()
    nats().backward()
    found = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def off_by(ours: Tensor, truth: Tensor) -> float:
    return (ours - truth).norm().item() / truth.norm().item()


def compute_of(device: str = "cpu", **settings: Any) -> Compute:
    return resolve_compute(ComputeConfig(**{"precision": "fp32", "compile": False, **settings}), device)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3))
def test_documents_and_positions_equal_those_counted_one_by_one(ids, count):
    lines = [ids, *[ids[::-1]] * (count - 1)]
    found = find_documents(torch.tensor(lines), 3)
    for row, line in enumerate(lines):
        number, position = 0, -1
        for index, id in enumerate(line):
            number, position = (number + 1, 0) if id == 3 else (number, position + 1)
            assert found.document_ids[row, index] == number
            assert found.positions[row, index] == position


@pytest.mark.parametrize("kernel", ["mask", "one-by-one"])
@pytest.mark.parametrize("graded", [True, False])
def test_each_document_has_the_logits_it_has_alone(kernel, graded):
    model, ids_BT = small_model(), rows()
    for block in model.h:
        block.attn.document_kernel = kernel
    with torch.set_grad_enabled(graded):
        ours = model(ids_BT, find_documents(ids_BT, END_OF_TEXT))
        torch.testing.assert_close(ours, alone(model, ids_BT), rtol=1e-5, atol=1e-5)


def gradient_error(model: GPT, ids_BT: Tensor, compute: Compute) -> float:
    """How far the gradient of the loss is from the sum of those of the documents alone."""
    torch._dynamo.reset()
    targets_BT = ids_BT.roll(-1, 1)
    truth = gradients(model, lambda: cross_entropy_nats(alone(model, ids_BT), targets_BT))
    loss = NextTokenLoss(model, compute, END_OF_TEXT)
    return off_by(gradients(model, lambda: loss(ids_BT, targets_BT)), truth)


@pytest.mark.parametrize(
    "settings, tolerance",
    [
        ({}, 1e-5),
        ({"attention": "math"}, 1e-5),
        ({"loss": "chunked"}, 1e-5),
        ({"activation_checkpointing": "selective"}, 1e-5),
        ({"activation_checkpointing": "block"}, 1e-5),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
        ({"compile": True, "activation_checkpointing": "selective"}, 1e-5),
        ({"precision": "bf16"}, 0.03),
        ({"precision": "fp16"}, 0.03),
    ],
    ids=str,
)
def test_gradient_is_the_sum_of_those_of_the_documents_alone(settings, tolerance):
    """In 16 bits it differs by rounding."""
    assert gradient_error(small_model(), rows(), compute_of(**settings)) < tolerance


@pytest.mark.parametrize("wrong", ["attention", "positions"])
def test_comparison_detects_a_leak(wrong):
    model, ids_BT = small_model(), rows()
    found = find_documents(ids_BT, END_OF_TEXT)
    leaky = {
        "attention": found._replace(document_ids=torch.zeros_like(ids_BT)),
        "positions": found._replace(positions=torch.arange(24).expand_as(ids_BT)),
    }
    assert off_by(model(ids_BT, leaky[wrong]), alone(model, ids_BT)) > 1e-3


def test_other_documents_recompile_nothing(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    model, ids_BT = small_model(), rows()
    loss = NextTokenLoss(model, compute_of(compile=True), END_OF_TEXT)
    targets_BT = ids_BT.roll(-1, 1)
    first = loss(ids_BT, targets_BT)
    assert loss(ids_BT.roll(3, 1), targets_BT) != first
    with pytest.raises(torch._dynamo.exc.RecompileError):  # the negative control: another shape is noticed
        loss(ids_BT[:4], targets_BT[:4])


def test_torch_can_trace_and_differentiate_documents():
    generator = torch.Generator().manual_seed(3)
    stored = (torch.randn(2, 10, 3, 8, generator=generator) for _ in range(3))
    qkv = [each.transpose(1, 2).requires_grad_() for each in stored]
    document_BT = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3], [1] * 10])
    torch.library.opcheck(torch.ops.overnight.attend_documents.default, (*qkv, document_BT))


def test_dropout_takes_a_mask():
    """With the same documents; noise depends on shapes alone."""
    model = GPT(dataclasses.replace(SMALL, dropout=0.5), seed=1)
    NextTokenLoss(model, compute_of(), END_OF_TEXT)
    assert model.h[0].attn.document_kernel == "mask"
    ids_BT, logits = rows(), []
    documents = find_documents(ids_BT, END_OF_TEXT)
    for id in (END_OF_TEXT, END_OF_TEXT - 1):
        ids_BT[1, 6] = id  # in the second document, which ends here
        torch.manual_seed(5)
        logits.append(model(ids_BT, documents))
    assert torch.equal(logits[0][1, 7:], logits[1][1, 7:])
    assert not torch.equal(logits[0][1, 6], logits[1][1, 6])


def test_mask_in_training_is_refused_where_cudnn_may_take_it(monkeypatch):
    class OnGPU(Tensor):
        is_cuda = True

    q_BHTD = torch.randn(1, 1, 4, 8).as_subclass(OnGPU)
    document_BT = torch.zeros(1, 4, dtype=torch.long)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    with pytest.raises(AssertionError, match="NaN"):
        attend_with_mask(q_BHTD, q_BHTD, q_BHTD, document_BT)
    with torch.no_grad():
        attend_with_mask(q_BHTD, q_BHTD, q_BHTD, document_BT)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    attend_with_mask(q_BHTD, q_BHTD, q_BHTD, document_BT)


@pytest.mark.parametrize("T", [128, 200, 640])
def test_block_mask_equals_torch_s_from_the_whole_square(T):
    generator = torch.Generator().manual_seed(T)
    ids_BT = (
        torch.rand(6, T, generator=generator) < torch.tensor([0, 0.001, 0.01, 0.05, 0.5, 1])[:, None]
    ).int()
    document_BT = find_documents(ids_BT, 1).document_ids
    ours = build_block_mask(document_BT)

    def is_visible(row, head, query, key):
        return (query >= key) & (document_BT[row, query] == document_BT[row, key])

    truth = create_block_mask(is_visible, 6, None, T, T, device="cpu")
    assert ours.shape == truth.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(truth, f"{name}_num_blocks")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts)
        chosen = torch.arange(counts.shape[-1]) < counts[..., None]
        listed = (getattr(each, f"{name}_indices").masked_fill(~chosen, -1) for each in (ours, truth))
        assert torch.equal(*listed)
    one_row = torch.tensor(4), torch.tensor(0), torch.arange(T)[:, None], torch.arange(T)
    assert torch.equal(ours.mask_mod(*one_row), is_visible(*one_row))


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="flex_attention's CPU kernel needs AVX2")
def test_compiled_flex_equals_the_mask():
    """Forward only: on a CPU flex_attention has no backward pass."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(2)
    q_BHTD = torch.randn(4, 2, 384, 16, generator=generator)
    often = torch.tensor([0, 0.005, 0.02, 0.5])[:, None]
    document_BT = (torch.rand(4, 384, generator=generator) < often).cumsum(1)
    ours = attend_within_documents(q_BHTD, q_BHTD, q_BHTD, document_BT, "compiled-flex", 0.0)
    truth = attend_with_mask(q_BHTD, q_BHTD, q_BHTD, document_BT)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"compile": True},
        {"compile": False},
        {"compile": True, "activation_checkpointing": "block"},
        {"attention": "math"},
    ],
    ids=str,
)
@pytest.mark.parametrize("T", [256, 200])
def test_gradient_on_a_gpu_is_that_of_the_documents_alone(T, settings):
    compute = compute_of("cuda", **settings)
    model = GPT(dataclasses.replace(SMALL, context_length=T), seed=1).to("cuda")
    generator = torch.Generator().manual_seed(T)
    ids_BT = torch.randint(END_OF_TEXT, (4, T), generator=generator)
    ids_BT[torch.rand(4, T, generator=generator) < torch.tensor([0, 0.004, 0.02, 0.1])[:, None]] = END_OF_TEXT
    assert gradient_error(model, ids_BT.to("cuda"), compute) < 1e-4
    expected = "math with a mask" if compute.attention == "math" else "flex"
    assert describe_attention_kernel(model.config, compute, within_documents=True) == expected
