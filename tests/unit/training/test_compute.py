from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from overnight.model import LossMethod
from overnight.model.gpt import GPT, initialize
from overnight.model.loss import cross_entropy_nats
from overnight.model.model_config import ModelConfig
from overnight.training import ComputeConfig
from overnight.training import compute as compute_module
from overnight.training.compute import (
    OF_PROCESSES,
    build_loss,
    can_compile,
    explain_compute,
    find_attention_kernel,
    resolve_compute,
)

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50)


def next_token_nats(model: GPT, ids: Tensor, targets: Tensor, method: LossMethod) -> Tensor:
    assert method == "full"
    return cross_entropy_nats(model(ids), targets)


def small_model(dropout: float = 0.0) -> GPT:
    model = GPT(ModelConfig(**{**vars(SMALL), "dropout": dropout}))
    initialize(model, seed=0)
    return model


def loss_and_gradient(model: GPT, **settings: object) -> tuple[float, Tensor]:
    """Mean nats per token, and the gradient of all parameters in a row."""
    torch._dynamo.reset()
    compute = ComputeConfig(**{"precision": "fp32", "compile": False, **settings})  # type: ignore[arg-type]
    function: Callable[[Tensor, Tensor], Tensor] = build_loss(
        model, next_token_nats, resolve_compute(compute, "cpu")
    )
    drawn = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    ids, targets = drawn[:, :-1], drawn[:, 1:]
    for _ in range(2):  # a second micro-batch takes the same function
        model.zero_grad()
        torch.manual_seed(7)
        loss = function(ids, targets) / targets.numel()
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def off_by(ours: tuple[float, Tensor], truth: tuple[float, Tensor]) -> tuple[float, float]:
    """Difference of the losses in nats, and of the gradients relative to their norm."""
    return abs(ours[0] - truth[0]), float((ours[1] - truth[1]).norm() / truth[1].norm())


def test_what_is_left_open_is_decided_and_what_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(compute_module, "can_compile", lambda: True)
    decided = resolve_compute(ComputeConfig(), "cpu")
    assert (decided.device, decided.precision, decided.compile) == ("cpu", "bf16", True)
    assert (decided.attention, decided.head) == ("blocks", "full")
    given = ComputeConfig(precision="fp32", compile=False, attention="math", loss="chunked")
    kept = resolve_compute(given, "cpu")
    assert (kept.precision, kept.compile, kept.attention, kept.head) == ("fp32", False, "math", "chunked")
    assert resolve_compute(ComputeConfig(), "mps").compile is False
    assert resolve_compute(ComputeConfig(precision="fp32"), "cpu").attention == "fused"


@pytest.mark.parametrize(("setting", "value"), [("precision", "tf32"), ("loss", "fp8")])
def test_what_the_device_lacks_is_refused(setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value} "):
        resolve_compute(ComputeConfig(**{setting: value}), "mps")  # type: ignore[arg-type]


def test_compiling_without_a_compiler_is_refused_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "can_compile", lambda: False)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        resolve_compute(ComputeConfig(compile=True), "cpu")
    decided = resolve_compute(ComputeConfig(), "cpu")
    assert decided.compile is False
    assert "no C++ compiler" in explain_compute(ComputeConfig(), decided)["compile"]


def test_each_choice_has_its_reason() -> None:
    asked = ComputeConfig(precision="fp32", activation_checkpointing="block")
    reasons = explain_compute(asked, resolve_compute(asked, "cpu"))
    assert reasons.keys() == vars(asked).keys() - OF_PROCESSES
    assert (reasons["precision"], reasons["activation_checkpointing"]) == (
        "fp32 (as asked)",
        "block (as asked)",
    )
    assert reasons["device"] == "cpu (the best one found)"


def test_compiling_needs_a_compiler_and_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not can_compile()
    (tmp_path / "Python.h").touch()
    assert can_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile()


@pytest.mark.parametrize("attention", ["fused", "blocks", "math"])
@pytest.mark.parametrize(
    ("precision", "nats", "gradient"), [("fp32", 1e-6, 1e-6), ("bf16", 2e-3, 0.02), ("fp16", 1e-3, 0.005)]
)
def test_precision_and_kernel_change_the_step_by_no_more_than_their_rounding(
    precision: str, nats: float, gradient: float, attention: str
) -> None:
    model = small_model()
    truth = loss_and_gradient(model)
    ours = loss_and_gradient(model, precision=precision, attention=attention)
    loss_off, gradient_off = off_by(ours, truth)
    assert loss_off <= nats
    assert gradient_off <= gradient
    if precision != "fp32":
        assert gradient_off > 1e-5, "nothing was computed in a shorter precision"


@pytest.mark.parametrize("attention", ["blocks", "math"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation_checkpointing", ["selective", "block"])
def test_recomputation_changes_nothing(activation_checkpointing: str, precision: str, attention: str) -> None:
    model = small_model(dropout=0.3)
    settings: dict[str, object] = {"precision": precision, "attention": attention}
    kept = loss_and_gradient(model, **settings)
    again = loss_and_gradient(model, activation_checkpointing=activation_checkpointing, **settings)
    assert again[0] == kept[0]
    assert torch.equal(again[1], kept[1])
    back = loss_and_gradient(model, **settings)
    assert torch.equal(back[1], kept[1])
    assert not any("forward" in vars(block) for block in model.h) or attention == "math"


def saved_bytes(model: GPT, activation_checkpointing: str) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    compute = resolve_compute(
        ComputeConfig(precision="bf16", compile=False, activation_checkpointing=activation_checkpointing),
        "cpu",
    )  # type: ignore[arg-type]
    function = build_loss(model, next_token_nats, compute)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(4, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(ids, ids)
    return sum(kept.values())


def test_recomputation_keeps_less() -> None:
    model = small_model()
    assert saved_bytes(model, "block") < 0.7 * saved_bytes(model, "none")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"attention": "math", "activation_checkpointing": "block"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_compiled_loss_is_the_same_loss(settings: dict[str, object]) -> None:
    model = small_model()
    loss_off, gradient_off = off_by(
        loss_and_gradient(model, compile=True, **settings), loss_and_gradient(model, **settings)
    )
    assert loss_off <= 1e-6
    assert gradient_off <= 1e-5


def test_the_kernel_that_attends_is_named() -> None:
    def kernel(**settings: object) -> str:
        asked = ComputeConfig(precision="bf16", **settings)  # type: ignore[arg-type]
        return find_attention_kernel(SMALL, resolve_compute(asked, "cpu"))

    assert [kernel(attention=name) for name in ("blocks", "fused", "math")] == ["blocks", "flash", "math"]
