"""Attention within a window: against a naive twin, with gradients, and what it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from overnight.model.kernels import QUERIES, Visible, find_documents
from overnight.model.windows import attend_in_window, block_spans

B, H, D = 2, 3, 8


def naive(q, k, v, document, window):
    """The formula, in float64, query by query."""
    mixed = torch.empty_like(q, dtype=torch.float64)
    q, k, v = (part.double() for part in (q, k, v))
    for row in range(len(q)):
        for query in range(q.shape[2]):
            first = max(0, query - window + 1)
            if document is not None:
                first = max(first, int((document[row] == document[row, query]).nonzero()[0]))
            keys, values = k[row, :, first : query + 1], v[row, :, first : query + 1]
            weights = (keys @ q[row, :, query, :, None] * D**-0.5).softmax(dim=1)
            mixed[row, :, query] = (weights * values).sum(1)
    return mixed


def with_gradients(attend, inputs):
    """The output, and the gradients of its weighted sum."""
    inputs = [part.detach().requires_grad_() for part in inputs]
    mixed = attend(*inputs)
    weight = torch.linspace(0, 1, mixed.numel(), dtype=torch.float64).view(mixed.shape)
    (mixed.double() * weight).sum().backward()
    return [mixed.detach(), *(part.grad for part in inputs)]


@pytest.mark.parametrize(
    "length, window",
    [(2, 1), (40, 7), (QUERIES, QUERIES), (QUERIES + 1, 50), (300, 129), (2 * QUERIES, 1000)],
)
@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize("kernel, dtype, at_most", [("fused", "float32", 1e-5), ("blocks", "bfloat16", 3e-2)])
def test_as_the_formula(length, window, within_documents, kernel, dtype, at_most):
    torch.manual_seed(0)
    inputs = [torch.randn(B, H, length, D).to(getattr(torch, dtype)) for _ in range(3)]
    document = positions = None
    if within_documents:
        document, positions = find_documents((torch.arange(length) - length // 3).expand(B, -1), 0)
    visible = Visible(None, document, window, positions)
    ours = with_gradients(lambda q, k, v: attend_in_window(q, k, v, visible, kernel, 0.0), inputs)
    theirs = with_gradients(lambda q, k, v: naive(q, k, v, document, window), inputs)
    wrong = with_gradients(lambda q, k, v: naive(q, k, v, document, window // 2 or 2), inputs)
    for mine, right in zip(ours, theirs, strict=True):
        assert F.mse_loss(mine.double(), right.double()).sqrt() < at_most * right.double().std().clamp(
            min=0.1
        )
    if window < length:
        assert F.mse_loss(wrong[0], theirs[0]).sqrt() > at_most, "another window is noticed"


def test_a_block_reads_only_what_its_queries_see():
    spans = block_spans(1024, 256)
    assert [end for _, _, end in spans][-1] == 1024
    assert all(end - first <= QUERIES + 255 for first, _, end in spans)
    assert spans[0] == (0, 0, QUERIES)


def test_a_cached_token_reads_the_newest_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, 20, D), torch.randn(B, H, 20, D), torch.randn(B, H, 20, D)
    mask = torch.ones(B, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., :16] = False  # padding of a shorter row
    with torch.no_grad():
        ours = attend_in_window(q[:, :, -1:], k, v, Visible(mask, None, 7), "fused", 0.0)
    assert torch.allclose(ours[0].double(), naive(q, k, v, None, 7)[0, :, -1:], atol=1e-6)
    assert torch.allclose(ours[1].double(), naive(q, k, v, None, 4)[1, :, -1:], atol=1e-6)
