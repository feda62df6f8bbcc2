"""Statistics of the weights, whole and sharded."""

from __future__ import annotations

import math

import pytest
import torch

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.run import evaluate
from overnight.run.evaluate import describe_weights
from overnight.training.state import TensorShard


@pytest.fixture
def model():
    """Freshly initialised."""
    return GPT(ModelConfig(n_layer=3, n_head=2, n_embd=64, context_length=16, vocab_size=100), seed=1)


def test_statistics_are_a_mean_and_a_ratio_of_deviations(model):
    initial = describe_weights(model, SINGLE_PROCESS)
    assert initial == {"norm_gain": 1.0, "residual_ratio": pytest.approx(1 / math.sqrt(6), rel=0.02)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 1.0, generator=generator)
    weights = model.weights()

    def all_of(*endings):
        return torch.cat([each.flatten() for name, each in weights.items() if name.endswith(endings)])

    facts = describe_weights(model, SINGLE_PROCESS)
    gains = all_of("ln_1.weight", "ln_2.weight", "ln_f.weight")
    assert gains.numel() == 7 * 64
    assert facts["norm_gain"] == pytest.approx(gains.mean().item(), rel=1e-5)
    ratio = all_of("c_proj.weight").std(correction=0) / all_of("c_fc.weight").std(correction=0)
    assert facts["residual_ratio"] == pytest.approx(ratio.item(), rel=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.inf)
    assert math.isnan(describe_weights(model, SINGLE_PROCESS)["residual_ratio"])


def test_sums_of_shards_give_the_same(model, monkeypatch):
    whole, found = describe_weights(model, SINGLE_PROCESS), {}
    sent: list[torch.Tensor] = []

    def all_reduce(self, tensors):
        """The second process adds what the first one has sent."""
        sent.append(tensors[0].clone())
        if self.rank == 1:
            tensors[0].add_(sent[0])

    monkeypatch.setattr(World, "all_reduce", all_reduce)
    for rank in (0, 1):
        monkeypatch.setattr(
            evaluate, "local_shard", lambda tensor, rank=rank: TensorShard(torch.chunk(tensor, 2)[rank], 0)
        )
        found[rank] = describe_weights(model, World(rank=rank, size=2, device="cpu"))
    assert found[1] == pytest.approx(whole, rel=1e-5)
    assert found[0] != pytest.approx(whole, rel=1e-5)
