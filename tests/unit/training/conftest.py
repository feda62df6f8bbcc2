"""A tiny model, its optimizer, and a few steps of it."""

from __future__ import annotations

import pytest
import torch

from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.training import OptimizerConfig
from overnight.training.optim import build_optimizer, clip_gradients, step_if
from overnight.training.state import TrainState

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50)


@pytest.fixture(scope="session")
def train_on():
    """`train_on(state, steps)`: steps on ids that are a function of the step."""

    def train(state, steps):
        parameters = list(state.model.parameters())
        for _ in range(steps):
            ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(state.step))
            state.model(ids).logsumexp(-1).sum().backward()
            clip_gradients(parameters, 1.0)
            step_if(state.optimizer, state.scaler, torch.tensor(True), 1e-2)
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1

    return train


@pytest.fixture(scope="session")
def build_state(train_on):
    """`build_state(steps)`: the state of a tiny model after some steps."""

    def build(steps, seed=0):
        model = GPT(CONFIG, seed=seed)
        state = TrainState(model, build_optimizer(model, OptimizerConfig()))
        train_on(state, steps)
        return state

    return build
