"""How a loss is computed (precision, kernel, compiler, checkpointing) changes it by rounding only."""

from __future__ import annotations

import shutil
import sysconfig
from typing import Any

import pytest
import torch
from torch import Tensor

from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.training import Compute, ComputeConfig
from overnight.training import compute as compute_module
from overnight.training.compute import (
    OF_PROCESSES,
    NextTokenLoss,
    can_compile,
    describe_attention_kernel,
    explain_compute,
    resolve_compute,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
LossAndGradient = tuple[float, Tensor]


def small_model(dropout: float = 0.0) -> GPT:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50, dropout=dropout)
    return GPT(config, seed=0)


def compute_of(**settings: Any) -> Compute:
    return resolve_compute(ComputeConfig(**{"precision": "fp32", "compile": False, **settings}), "cpu")


def loss_and_gradient(model: GPT, **settings: Any) -> LossAndGradient:
    """Nats per token and the gradient, in the second of two micro-batches."""
    torch._dynamo.reset()
    function = NextTokenLoss(model, compute_of(**settings))
    drawn = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    ids, targets = drawn[:, :-1], drawn[:, 1:]
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(7)
        loss = function(ids, targets) / targets.numel()
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def difference(ours: LossAndGradient, truth: LossAndGradient) -> tuple[float, float]:
    """Of the losses in nats, and of the gradients relative to their norm."""
    return abs(ours[0] - truth[0]), float((ours[1] - truth[1]).norm() / truth[1].norm())


def test_open_settings_are_decided_and_given_ones_kept(monkeypatch):
    monkeypatch.setattr(compute_module, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(compute_module, "can_compile", lambda: True)
    decided = Compute(device="cpu", precision="bf16", compile=True, attention="blocks", loss="full")
    assert resolve_compute(ComputeConfig(), "cpu") == decided
    given: dict[str, Any] = {"precision": "fp32", "compile": False, "attention": "math", "loss": "chunked"}
    assert resolve_compute(ComputeConfig(**given), "cpu") == Compute(device="cpu", **given)
    assert resolve_compute(ComputeConfig(), "mps").compile is False
    assert resolve_compute(ComputeConfig(precision="fp32"), "cpu").attention == "fused"


@pytest.mark.parametrize(("setting", "value"), [("precision", "tf32"), ("loss", "fp8")])
def test_setting_that_the_device_lacks_is_refused(setting, value):
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ValueError, match=f"{setting}={value} "):
        resolve_compute(ComputeConfig(**settings), "mps")


def test_each_choice_has_its_reason():
    asked = ComputeConfig(precision="fp32", activation_checkpointing="block")
    reasons = explain_compute(asked, resolve_compute(asked, "cpu"))
    assert reasons.keys() == vars(asked).keys() - OF_PROCESSES
    requested = {name for name, reason in reasons.items() if reason.endswith("(as requested)")}
    assert requested == {"precision", "activation_checkpointing"}
    assert reasons["device"] == "cpu (the best one found)"


def test_compiling_needs_a_compiler_and_pythons_headers(monkeypatch, tmp_path):
    """Without one, only a run that asks for it is refused."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not can_compile()
    (tmp_path / "Python.h").touch()
    assert can_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="compile=True"):
        resolve_compute(ComputeConfig(compile=True), "cpu")
    decided = resolve_compute(ComputeConfig(), "cpu")
    assert decided.compile is False
    assert "compiler" in explain_compute(ComputeConfig(), decided)["compile"]


@pytest.mark.parametrize("attention", ["fused", "blocks", "math"])
@pytest.mark.parametrize(
    ("precision", "nats", "gradient"), [("fp32", 1e-6, 1e-6), ("bf16", 2e-3, 0.02), ("fp16", 1e-3, 0.005)]
)
def test_precision_and_kernel_differ_by_their_rounding_only(precision, nats, gradient, attention):
    model = small_model()
    ours = loss_and_gradient(model, precision=precision, attention=attention)
    loss_off, gradient_off = difference(ours, loss_and_gradient(model))
    assert loss_off <= nats
    assert gradient_off <= gradient
    if precision != "fp32":
        assert gradient_off > 1e-5, "nothing was computed in a shorter precision"


@pytest.mark.parametrize("attention", ["blocks", "math"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_activation_checkpointing_changes_no_bit(mode, precision, attention):
    model = small_model(dropout=0.3)
    settings = {"precision": precision, "attention": attention}
    kept = loss_and_gradient(model, **settings)
    again = loss_and_gradient(model, activation_checkpointing=mode, **settings)
    back = loss_and_gradient(model, **settings)
    assert again[0] == kept[0]
    assert torch.equal(again[1], kept[1])
    assert torch.equal(back[1], kept[1]), "another loss of the same model keeps everything again"
    assert not any("forward" in vars(block) for block in model.h)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"attention": "math", "activation_checkpointing": "block"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_compiled_loss_is_the_same_loss(settings):
    model = small_model()
    compiled = loss_and_gradient(model, compile=True, **settings)
    loss_off, gradient_off = difference(compiled, loss_and_gradient(model, **settings))
    assert loss_off <= 1e-6
    assert gradient_off <= 1e-5


@pytest.mark.parametrize(
    "attention, precision, dropout, kernel, of_documents",
    [
        (None, "bf16", 0.0, "blocks", "flash, one document after the other"),
        ("fused", "bf16", 0.0, "flash", "flash, one document after the other"),
        ("math", "fp32", 0.0, "math", "math with a mask"),
        ("fused", "fp32", 0.1, "math", "torch's choice with a mask"),
    ],
)
def test_attention_kernel_is_named(attention, precision, dropout, kernel, of_documents):
    model, compute = small_model(dropout).config, compute_of(precision=precision, attention=attention)
    assert describe_attention_kernel(model, compute) == kernel
    assert describe_attention_kernel(model, compute, within_documents=True) == of_documents
