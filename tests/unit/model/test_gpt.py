"""GPT-2, against its definition."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import pytest
import torch

from overnight.model.gpt import GPT, empty_model, eval_mode, initialize
from overnight.model.loss import next_token_loss
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.model.presets import PRESETS

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=32, context_length=16, vocab_size=100)
LOSSES_OF_GPT2 = [
    *(4.582040309906006, 4.352906227111816, 4.1713032722473145, 4.005329608917236, 3.74428391456604),
    *(3.513524293899536, 3.3116772174835205, 3.0985240936279297, 2.885248899459839, 2.6703927516937256),
]


def small_model() -> GPT:
    return GPT(SMALL, seed=1)


def test_padding_is_not_visible_and_stays_zero_while_training():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        logits = model(torch.randint(100, (2, 16)))
        assert logits.shape == (2, 16, 100)
        logits.logsumexp(-1).sum().backward()
        optimizer.step()
    assert model.wte.weight.shape == (128, 32)
    assert model.weights()["wte.weight"].shape == (100, 32)
    assert not model.wte.weight[100:].any()


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168), ("gpt2-1558m", 1_557_611_200)],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert PRESETS[name].parameter_count() == parameters


def test_parameter_count_and_shapes_are_those_of_the_module():
    model = small_model()
    assert sum(weight.numel() for weight in model.weights().values()) == SMALL.parameter_count()
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    assert list(parameter_shapes(SMALL).items()) == shapes


def test_new_model_is_initialised():
    """With a seed of its own; nothing has to be called before the model is of use."""
    torch.manual_seed(17)  # the global generator must not matter
    model, drawn = GPT(SMALL, seed=5), empty_model(SMALL)
    initialize(drawn, 5)
    assert model(torch.zeros(1, 4, dtype=torch.long)).std() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn.parameters(), strict=True))
    assert torch.equal(GPT(SMALL).wte.weight, GPT(SMALL, seed=1337).wte.weight)
    assert not torch.equal(model.wte.weight, GPT(SMALL, seed=6).wte.weight)
    with torch.device("meta"):
        assert GPT(SMALL).wte.weight.is_meta


def test_initialisation_follows_gpt2():
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=128, context_length=64, vocab_size=500), seed=3)
    for name, weight in model.weights().items():
        if name.endswith("c_proj.weight"):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif name.endswith("weight") and weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert set(weight.unique().tolist()) == ({1.0} if name.endswith("weight") else {0.0}), name


def test_parameter_without_a_rule_is_refused():
    model = GPT(SMALL)
    model.register_parameter("gate", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="gate"):
        initialize(model, seed=0)


def test_unfitting_weights_are_all_named_and_nothing_changes():
    model = small_model()
    weights = {name: weight.clone() + 1 for name, weight in model.weights().items()}
    del weights["ln_f.bias"]
    weights["lm_head.weight"] = torch.zeros(1)
    weights["wpe.weight"] = torch.zeros(2, 2)
    before = model.wte.weight.detach().clone()
    with pytest.raises(ValueError, match=r"lm_head\.weight.*ln_f\.bias.*wpe\.weight"):
        model.load_weights(weights)
    assert torch.equal(before, model.wte.weight)


def test_input_beyond_the_context_is_refused():
    with pytest.raises(IndexError, match="context_length=16"):
        small_model()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    "name, value", [("n_head", 5), ("n_layer", 0), ("dropout", 1.0), ("vocab_size", None)]
)
def test_invalid_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        GPT(dataclasses.replace(SMALL, **{name: value}))


def test_dropout_acts_only_while_training():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=8, vocab_size=30, dropout=0.5))
    ids = torch.randint(30, (1, 8))
    assert torch.equal(model.eval()(ids), model.eval()(ids))
    assert not torch.equal(model.train()(ids), model.train()(ids))


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_restores_the_mode_whatever_happens(training):
    model = small_model().train(training)
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training is training for module in model.modules())
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        raise KeyboardInterrupt
    assert all(module.training is training for module in model.modules())


def test_empty_model_is_complete_once_loaded():
    expected, loaded = small_model(), empty_model(SMALL)
    loaded.load_weights(expected.weights())
    assert not loaded.wte.weight[100:].any()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_gpt2_is_to_the_bit_what_it_was_before_there_were_switches():
    """The digest of all weights and ten losses, as the commit before the first switch gave them (656bb5f)."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=24, vocab_size=97), seed=7)
    digest = hashlib.sha256()
    for name, weight in model.weights().items():
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "f0784bbfdec2f734894d9ab9cba2a49c1430cccb943666fb5986cbdafd9ed17b"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    ids, losses = torch.randint(97, (4, 25), generator=torch.Generator().manual_seed(11)), []
    for _ in range(10):
        loss = next_token_loss(model, ids[:, :-1], ids[:, 1:], "full") / ids[:, 1:].numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(LOSSES_OF_GPT2, rel=1e-6)  # another processor rounds otherwise
