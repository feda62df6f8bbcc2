from __future__ import annotations

import math

import pytest
import torch

from overnight.model.gpt import GPT, initialize
from overnight.model.loss import LossSum, cross_entropy_nats
from overnight.model.model_config import ModelConfig


def small_model() -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=50))
    initialize(model, seed=0)
    return model


def test_it_is_the_negative_log_likelihood_of_each_target_summed() -> None:
    model = small_model()
    ids, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    expected = 0.0
    for row in range(3):
        for position in range(8):
            logits = model(ids[row : row + 1, : position + 1])[0, -1].double()
            expected -= (logits - logits.logsumexp(0))[targets[row, position]].item()
    assert cross_entropy_nats(model(ids), targets).item() == pytest.approx(expected, rel=1e-6)


def test_padding_takes_no_part_in_the_loss() -> None:
    model = small_model()
    ids, targets = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    before = cross_entropy_nats(model(ids), targets)
    with torch.no_grad():
        model.wte.weight[50:] = 100.0
    assert torch.equal(before, cross_entropy_nats(model(ids), targets))


def test_uneven_parts_add_up_to_the_whole() -> None:
    parts = [LossSum(torch.tensor(10.0), 4), LossSum(torch.tensor(1.0), 1)]
    whole = parts[0].plus(parts[1])
    assert whole.per_token() == pytest.approx(2.2)
    mean_of_means = sum(part.per_token() for part in parts) / 2
    assert whole.per_token() != pytest.approx(mean_of_means)
    assert whole.perplexity() == pytest.approx(math.exp(2.2))
    assert whole.bits_per_byte(8) == pytest.approx(11 / math.log(2) / 8)
