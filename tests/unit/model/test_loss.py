"""The loss, whole, in chunks and in 8 bits, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model import LossMethod, loss_kernels
from overnight.model.loss import head_loss
from overnight.model.loss_kernels import fp8_unavailable_reason

C, V, VOCAB_SIZE = 32, 64, 50


def inputs(B: int = 3, T: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B * T)
    hidden = torch.randn(B, T, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator)
    weight[VOCAB_SIZE:] = 0
    targets = torch.randint(VOCAB_SIZE, (B, T), generator=generator)
    return hidden, weight.requires_grad_(), targets


def mean_and_gradients(
    method: LossMethod, dtype: torch.dtype | None = None, compiled: bool = False, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Mean nats, and its gradients by hidden states and weight."""
    hidden, weight, targets = inputs()

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return head_loss(hidden, weight, targets, vocab_size=VOCAB_SIZE, method=method)

    function = torch.compile(compute, fullgraph=True, dynamic=False) if compiled else compute
    mean = function(hidden, weight, targets) * scale / targets.numel()
    return mean.detach() / scale, *(each / scale for each in torch.autograd.grad(mean, (hidden, weight)))


def naive() -> tuple[Tensor, ...]:
    """The same in float64, from the definition."""
    hidden, weight, targets = inputs()
    hidden, weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    probabilities = (hidden @ weight[:VOCAB_SIZE].T).softmax(-1)
    mean = -probabilities.gather(2, targets[:, :, None]).log().mean()
    return mean.detach(), *torch.autograd.grad(mean, (hidden, weight))


def off_by(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest difference of the three, relative to their size."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True))


@pytest.fixture(params=[1, 4, 21, 100])
def in_chunks(request, monkeypatch):
    """Chunks of one position, of some that do not divide 21, of all, of more than there are."""
    monkeypatch.setattr(loss_kernels, "rows_of_chunk", lambda rows, vocabulary: request.param)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("method", ["full", "chunked"])
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(None, 1, 1e-6), (torch.bfloat16, 1, 0.01), (torch.float16, 1, 0.002), (torch.float16, 2**16, 0.002)],
    ids=str,
)
def test_loss_and_gradients_equal_the_definition(method, dtype, scale, tolerance):
    """Also with a loss scale; rows of padding get no probability and no gradient."""
    ours = mean_and_gradients(method, dtype, scale=scale)
    assert off_by(ours, naive()) < tolerance
    assert not ours[2][VOCAB_SIZE:].any()


def test_comparison_detects_a_lost_chunk(monkeypatch):
    monkeypatch.setattr(loss_kernels, "rows_of_chunk", lambda rows, vocabulary: 7)
    right: Callable[..., tuple[Tensor, Tensor]] = loss_kernels._nats_and_gradient
    calls: list[int] = []

    def wrong(*given):
        nats, gradient = right(*given)
        calls.append(1)
        return nats, gradient if len(calls) != 2 else torch.zeros_like(gradient)

    monkeypatch.setattr(loss_kernels, "_nats_and_gradient", wrong)
    assert off_by(mean_and_gradients("chunked"), naive()) > 0.1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
def test_compiled_chunked_loss_is_the_same(monkeypatch):
    monkeypatch.setattr(loss_kernels, "rows_of_chunk", lambda rows, vocabulary: 11)
    torch._dynamo.reset()
    assert off_by(mean_and_gradients("chunked", compiled=True), naive()) < 1e-6


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    hidden, weight, targets = inputs()
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("a gradient was allocated"))
        ours = head_loss(hidden, weight, targets, vocab_size=VOCAB_SIZE, method="chunked")
    assert ours.item() / targets.numel() == pytest.approx(naive()[0].item(), rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp8_is_unavailable_without_a_gpu_that_has_it(device):
    reason = str(fp8_unavailable_reason(device))
    assert "loss=fp8" in reason
    assert device in reason


def test_fp8_loss_and_gradients_are_near_the_full_ones():
    """On a CPU torch multiplies in 8 bits as well, slowly: it shows whether scales and layouts are right."""
    hidden, weight, targets = inputs(2, 16)

    def both(method):
        mean = head_loss(hidden, weight, targets, vocab_size=VOCAB_SIZE, method=method) / targets.numel()
        return mean.detach(), *torch.autograd.grad(mean, (hidden, weight))

    ours, truth = both("fp8"), both("full")
    assert ours[0].item() == pytest.approx(truth[0].item(), abs=0.02)
    for gradient, true in zip(ours[1:], truth[1:], strict=True):
        assert F.cosine_similarity(gradient.flatten(), true.flatten(), dim=0) > 0.99
        assert gradient.norm().item() == pytest.approx(true.norm().item(), rel=0.05)
