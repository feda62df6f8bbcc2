from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from overnight.training import OptimizerConfig
from overnight.training.optim import apply_gradients, build_optimizer


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_matrices_decay_and_vectors_do_not() -> None:
    optimizer = build_optimizer(small_net(), OptimizerConfig())
    assert [{parameter.dim() for parameter in group["params"]} for group in optimizer.param_groups] == [
        {2},
        {1},
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def adamw_by_hand(
    weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float
) -> torch.Tensor:
    """Decoupled weight decay as Loshchilov and Hutter's algorithm 2 writes it, in float64."""
    weight, mean, square = (
        weight.double(),
        torch.zeros_like(weight).double(),
        torch.zeros_like(weight).double(),
    )
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.95 * square + 0.05 * gradient.double() ** 2
        corrected = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - rate * decay * weight - rate * corrected
    return weight


def test_the_update_is_adamw() -> None:
    net = small_net()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    gradients = [[torch.randn_like(parameter) for parameter in net.parameters()] for _ in range(5)]
    optimizer = build_optimizer(net, OptimizerConfig())
    for step in range(5):
        for parameter, gradient in zip(net.parameters(), gradients[step], strict=True):
            parameter.grad = gradient.clone()
        apply_gradients(optimizer, list(net.parameters()), 1e-2, None, GradScaler(enabled=False))
    for index, parameter in enumerate(net.parameters()):
        decay = 0.1 if parameter.dim() >= 2 else 0.0
        expected = adamw_by_hand(before[index], [step[index] for step in gradients], 1e-2, decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_the_norm_returned_is_the_one_before_clipping_and_the_update_is_clipped() -> None:
    net = small_net()
    twin = copy.deepcopy(net)
    for module, scale in ((net, 1.0), (twin, 100.0)):
        optimizer = build_optimizer(module, OptimizerConfig())
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        elements = sum(parameter.numel() for parameter in module.parameters())
        parameters = list(module.parameters())
        norm, _ = apply_gradients(optimizer, parameters, 1e-3, 1e-9, GradScaler(enabled=False))
        assert norm.item() == pytest.approx(scale * elements**0.5, rel=1e-5)
        assert all(parameter.grad is None for parameter in parameters)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak_learning_rate": 0.0},
        {"peak_learning_rate": float("nan")},
        {"beta2": 1.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
        {"epsilon": 0.0},
    ],
)
def test_what_makes_no_sense_is_told(wrong: dict[str, float]) -> None:
    (problem,) = OptimizerConfig(**wrong).problems()
    assert next(iter(wrong)) in problem


POISONS = (float("nan"), float("inf"), float("-inf"))


def state_of(net: nn.Module, optimizer: torch.optim.AdamW) -> list[bytes]:
    """Every byte of the weights, of both moments and of the counts of updates."""
    tensors = [parameter.detach() for parameter in net.parameters()]
    for parameter in net.parameters():
        tensors += [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return [tensor.numpy().tobytes() for tensor in tensors]


def update(
    net: nn.Module, optimizer: torch.optim.AdamW, poison: tuple[int, int, float] | None, nats: float = 1.0
) -> float:
    """One step on gradients of noise, an element of one of which is poisoned."""
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    if poison is not None:
        number, place, value = poison
        gradient = list(net.parameters())[number].grad
        assert gradient is not None
        gradient.view(-1)[place % gradient.numel()] = value
    told = torch.tensor(nats)
    found = apply_gradients(
        optimizer,
        list(net.parameters()),
        1e-2,
        1.0,
        GradScaler(enabled=False),
        lambda norm: norm.isfinite() & told.isfinite(),
    )
    assert bool(found.is_applied) == (poison is None and math.isfinite(nats))
    return found.grad_norm.item()


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_finite_never_reaches_the_weights(fused: bool) -> None:
    """300 gradients with one bad element, and losses that are bad themselves: not a byte changes."""
    net = small_net()
    optimizer = build_optimizer(net, OptimizerConfig(), fused=fused)
    update(net, optimizer, None)
    before = state_of(net, optimizer)
    parameters = len(list(net.parameters()))
    for number in range(300):
        norm = update(net, optimizer, (number % parameters, 7 * number, POISONS[number // 100]))
        assert not math.isfinite(norm)
        assert state_of(net, optimizer) == before
    for nats in POISONS:
        update(net, optimizer, None, nats)
        assert state_of(net, optimizer) == before
    update(net, optimizer, None)
    after = state_of(net, optimizer)
    assert not {*after} & {*before}, "a sound step changes everything"
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_without_the_guard_one_bad_element_is_the_end() -> None:
    """The control: what torch does by itself, and what multiplying the step by 0 would do."""
    net = small_net()
    optimizer = build_optimizer(net, OptimizerConfig())
    update(net, optimizer, None)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(parameter.isnan().all() for parameter in net.parameters())
    assert math.isnan(0 * float("nan"))


def test_a_bad_first_step_leaves_nothing_behind() -> None:
    runs = []
    for is_poisoned in (True, False):
        torch.manual_seed(3)
        net = small_net()
        optimizer = build_optimizer(net, OptimizerConfig())
        if is_poisoned:
            update(net, optimizer, (0, 0, float("nan")))
        torch.manual_seed(4)
        update(net, optimizer, None)
        runs.append(state_of(net, optimizer))
    assert runs[0] == runs[1]
