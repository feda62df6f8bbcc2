"""A small model for evaluations."""

from __future__ import annotations

import pytest
import torch

from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig


@pytest.fixture(scope="session")
def model() -> GPT:
    """Context 48, 97 ids in an embedding of 128 rows; weights large enough for ids to differ."""
    found = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=48, vocab_size=97))
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
        found.wte.weight[97:] = found.wte.weight[:31]  # likely ids, if padding were not excluded
    return found
