from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.conversion.huggingface import read_huggingface, write_huggingface
from overnight.doctor.check import CheckResult
from overnight.doctor.generation_checks import check_reference
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.characters import Characters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small GPT-2 as Transformers opens it, with biases that are not zero."""
    tokenizer = Characters("abc")
    sizes = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=tokenizer.vocab_size)
    model = GPT(sizes, seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    model.zero_padding()
    write_huggingface(model, tokenizer, tmp_path / "hf")
    return tmp_path / "hf"


def check(folder: Path) -> CheckResult:
    model, _ = read_huggingface(folder)
    return check_reference(model, folder)


def test_logits_equal_those_of_transformers(folder: Path) -> None:
    pytest.importorskip("transformers")
    found = check(folder)
    assert found.passed
    assert found.figures["largest_logit"] > 1


def test_another_nonlinearity_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    gelu = F.gelu

    def exact(x: Tensor, approximate: str = "none") -> Tensor:
        return gelu(x)

    monkeypatch.setattr("overnight.model.gpt.F.gelu", exact)
    found = check(folder)
    assert found.passed is False
    assert "tanh GELU" in found.cause


def test_without_transformers_it_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check(folder)
    assert found.passed is None
    assert "pip install transformers" in found.cause
