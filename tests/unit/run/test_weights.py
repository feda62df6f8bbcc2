import math
from collections.abc import Sequence

import pytest
import torch

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.run import log
from overnight.run.log import describe_weights
from overnight.training.checkpoint.format import TensorShard


@pytest.fixture
def model() -> GPT:
    built = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=64, context_length=16, vocab_size=100))
    initialize(built, 1)
    return built


def test_the_facts_are_a_mean_and_a_ratio_of_deviations(model: GPT) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 1.0, generator=generator)
    weights = model.weights()

    def all_of(*endings: str) -> torch.Tensor:
        return torch.cat([each.flatten() for name, each in weights.items() if name.endswith(endings)])

    facts = describe_weights(model, SINGLE_PROCESS)
    gains = all_of("ln_1.weight", "ln_2.weight", "ln_f.weight")
    assert gains.numel() == 7 * 64
    assert facts["norm_gain"] == pytest.approx(gains.mean().item(), rel=1e-5)
    ratio = all_of("c_proj.weight").std(correction=0) / all_of("c_fc.weight").std(correction=0)
    assert facts["residual_ratio"] == pytest.approx(ratio.item(), rel=1e-4)


def test_at_the_start_they_are_gpt_2_s(model: GPT) -> None:
    facts = describe_weights(model, SINGLE_PROCESS)
    assert facts == {"norm_gain": 1.0, "residual_ratio": pytest.approx(1 / math.sqrt(6), rel=0.02)}


class Beside(World):
    """One of two processes: what the first one says, the second one adds to its own."""

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        (sums,) = tensors
        if self.rank == 0:
            SAID.append(sums.clone())
        else:
            sums += SAID.pop()


SAID: list[torch.Tensor] = []


def test_shards_give_what_the_whole_gives(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = describe_weights(model, SINGLE_PROCESS), {}
    for rank in (0, 1):
        monkeypatch.setattr(
            log, "local_shard", lambda tensor, rank=rank: TensorShard(torch.chunk(tensor, 2)[rank], 0)
        )
        found[rank] = describe_weights(model, Beside(rank=rank, size=2, device="cpu"))
    assert found[1] == pytest.approx(whole, rel=1e-5)
    assert found[0] != pytest.approx(whole, rel=1e-5)


def test_nothing_is_changed(model: GPT) -> None:
    before = {name: weight.clone() for name, weight in model.weights().items()}
    noise = torch.get_rng_state()
    describe_weights(model, SINGLE_PROCESS)
    assert torch.equal(torch.get_rng_state(), noise)
    for name, weight in model.weights().items():
        assert torch.equal(weight, before[name])


def test_weights_of_which_only_infinity_is_left_have_no_ratio(model: GPT) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.inf)
    assert math.isnan(describe_weights(model, SINGLE_PROCESS)["residual_ratio"])
