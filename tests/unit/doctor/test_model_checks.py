from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import open_model
from overnight.doctor.model_checks import check_reference
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.characters import Characters


@pytest.fixture
def context(tmp_path):
    """A small GPT-2 as Transformers opens it, with biases that are not zero, as the baseline."""
    tokenizer = Characters("abc")
    sizes = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=tokenizer.vocab_size)
    model = GPT(sizes, seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    model.zero_padding()
    write_huggingface(model, tokenizer, tmp_path / "hf")
    return SimpleNamespace(baseline=open_model(str(tmp_path / "hf")))


def test_logits_are_those_of_transformers(context, monkeypatch):
    pytest.importorskip("transformers")
    found = check_reference(context)
    assert found.passed
    assert found.figures["largest_logit"] > 1
    gelu = F.gelu
    monkeypatch.setattr("overnight.model.gpt.F.gelu", lambda x, approximate="none": gelu(x))
    found = check_reference(context)
    assert found.passed is False
    assert "tanh GELU" in found.cause


def test_reference_is_skipped_without_transformers(context, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = check_reference(context)
    assert found.passed is None
    assert "pip install transformers" in found.cause
