"""The head and its loss in pieces, and in 8 bits, against all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model import LossMethod, loss
from overnight.model.loss import fp8_obstacle, head_loss, rows_of_chunk

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
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one position, of some that do not divide 21, of all, of more than there are."""
    monkeypatch.setattr(loss, "rows_of_chunk", lambda rows, vocabulary: request.param)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.002)], ids=str
)
def test_in_chunks_loss_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype | None, tolerance: float
) -> None:
    assert off_by(mean_and_gradients("chunked", dtype), naive()) < tolerance


@pytest.mark.parametrize("method", ["full", "chunked"])
def test_padding_gets_no_probability_and_no_gradient(method: LossMethod) -> None:
    assert not mean_and_gradients(method)[2][VOCAB_SIZE:].any()


def test_a_loss_that_is_scaled_for_float16_neither_overflows_nor_vanishes() -> None:
    assert off_by(mean_and_gradients("chunked", torch.float16, scale=65536.0), naive()) < 0.002


def test_a_chunk_whose_gradient_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "rows_of_chunk", lambda rows, vocabulary: 7)
    right: Callable[..., tuple[Tensor, Tensor]] = loss._nats_and_gradient
    calls: list[int] = []

    def wrong(*given: object) -> tuple[Tensor, Tensor]:
        nats, gradient = right(*given)
        calls.append(1)
        return nats, gradient if len(calls) != 2 else torch.zeros_like(gradient)

    monkeypatch.setattr(loss, "_nats_and_gradient", wrong)
    assert off_by(mean_and_gradients("chunked"), naive()) > 0.1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "rows_of_chunk", lambda rows, vocabulary: 11)
    torch._dynamo.reset()
    assert off_by(mean_and_gradients("chunked", compiled=True), naive()) < 1e-6


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *given, **named: pytest.fail("a gradient was allocated"))
    with torch.no_grad():
        ours = head_loss(hidden, weight, targets, vocab_size=VOCAB_SIZE, loss="chunked")
    monkeypatch.setattr(torch, "zeros_like", zeros)
    assert ours.item() / targets.numel() == pytest.approx(naive()[0].item(), rel=1e-6)


def test_a_chunk_is_an_eighth_or_has_256_megabytes_of_logits() -> None:
    assert rows_of_chunk(65_536, 50_304) == 8_192
    assert rows_of_chunk(2_048, 50_304) == 2**28 // (4 * 50_304) == 1_334


def test_eight_bits_are_refused_where_there_are_none() -> None:
    assert "loss=fp8 needs an NVIDIA GPU" in str(fp8_obstacle("cpu"))
    assert "not mps" in str(fp8_obstacle("mps"))


def test_in_eight_bits_the_loss_is_near_and_the_gradients_point_the_same_way() -> None:
    """On a CPU torch multiplies in 8 bits as well, slowly: it shows whether scales and layouts are right."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, C, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(V, C, generator=generator)).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (2, 16), generator=generator)

    def both(method: LossMethod) -> tuple[Tensor, ...]:
        mean = head_loss(hidden, weight, targets, vocab_size=VOCAB_SIZE, method=method) / targets.numel()
        return mean.detach(), *torch.autograd.grad(mean, (hidden, weight))

    ours, truth = both("fp8"), both("full")
    assert ours[0].item() == pytest.approx(truth[0].item(), abs=0.02)
    for gradient, true in zip(ours[1:], truth[1:], strict=True):
        assert F.cosine_similarity(gradient.flatten(), true.flatten(), dim=0) > 0.99
        assert gradient.norm().item() == pytest.approx(true.norm().item(), rel=0.05)
