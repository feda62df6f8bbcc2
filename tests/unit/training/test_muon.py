"""Muon against torch's; groups, skipped updates, checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from overnight.model.feed_forward import BALANCE_GRADIENT
from overnight.model.gpt import GPT
from overnight.model.loss import next_token_loss
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, with_settings
from overnight.training import OptimizerConfig
from overnight.training.checkpoint.load import load_checkpoint
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.muon import even_rows, orthogonalize
from overnight.training.optim import build_optimizer, step_if
from overnight.training.state import TrainState

OFF, YES, NO = GradScaler(enabled=False), torch.tensor(True), torch.tensor(False)
SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50)
MODERN = replace(SIZES, positions="rotary", tied_head=False, activation="swiglu", n_kv_head=1)
EXPERTS = replace(SIZES, n_expert=4, balance_rate=0.01)
MUON = OptimizerConfig(optimizer="muon", peak_learning_rate=1e-3)
EVERYTHING = replace(
    MUON, row_normalization=True, cautious_weight_decay=True, matrix_weight_decay=0.1, momentum_warmup_steps=3
)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights_after(model: GPT, optimizer, steps: int = 5, rate: float = 1e-3) -> dict[str, torch.Tensor]:
    for step in range(steps):
        give_gradients(model, step)
        step_if(optimizer, OFF, YES, rate)
    return {name: weight.clone() for name, weight in model.weights().items()}


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_update_is_orthogonal_and_close_to_the_nearest(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix * torch.linspace(0.1, 2, shape[1])
    found = orthogonalize(matrix)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.95  # a singular value near 0 takes longer
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    assert nn.functional.cosine_similarity(found.flatten(1), nearest.flatten(1)).min() > 0.97
    assert nn.functional.cosine_similarity(matrix.flatten(1), nearest.flatten(1)).max() < 0.95  # no change


@pytest.mark.parametrize(("momentum", "is_same"), [(0.95, True), (0.9, False)])
def test_matrices_follow_torch_s_muon_and_the_rest_torch_s_adamw(momentum, is_same):
    config = replace(MUON, momentum_warmup_steps=1, matrix_weight_decay=0.1, matrix_learning_rate=0.02)
    ours, theirs = GPT(SIZES), GPT(SIZES)
    before = {name: weight.clone() for name, weight in ours.weights().items()}
    found = weights_after(ours, build_optimizer(ours, config))
    named = dict(theirs.named_parameters())
    # torch's takes the fused matrix of queries, keys and values as one: it is not compared.
    blocks = [name for name in named if name.endswith(("c_proj.weight", "c_fc.weight"))]
    muon = torch.optim.Muon([named[name] for name in blocks], lr=0.02, weight_decay=0.1, momentum=momentum)
    rest = build_optimizer(theirs, OptimizerConfig(), names=set(named) - set(blocks))
    for step in range(5):
        give_gradients(theirs, step)
        muon.step()
        step_if(rest, OFF, YES, 1e-3)
    for name, weight in theirs.weights().items():
        if name in blocks:  # both round to 16 bits, in sums of another order
            error = (found[name] - weight).norm() / (weight - before[name]).norm()
            assert (error < 0.01) == is_same, name
        elif "c_attn.weight" not in name:
            assert torch.equal(found[name], weight), name


def test_queries_keys_and_values_are_matrices_of_their_own():
    model = GPT(SIZES)
    before = model.h[0].attn.c_attn.weight.detach().clone()
    optimizer = build_optimizer(model, replace(MUON, momentum_warmup_steps=1))
    give_gradients(model, 0)
    step_if(optimizer, OFF, YES, 1e-3)
    change = model.h[0].attn.c_attn.weight.detach() - before
    for part in change.split(32):
        values = torch.linalg.svdvals(part / 0.02)
        assert 0.6 < values.min() < values.max() < 1.3
    assert torch.linalg.svdvals(change / 0.02).max() > 1.3  # the whole is not orthogonal


@pytest.mark.parametrize("config", [SIZES, MODERN, EXPERTS], ids=["gpt2", "modern", "experts"])
def test_stacked_is_one_by_one(config):
    found = []
    for stacked in (True, False):
        model = GPT(config)
        found.append(weights_after(model, build_optimizer(model, EVERYTHING, stacked=stacked)))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("optimizer", [MUON, EVERYTHING, OptimizerConfig()], ids=["plain", "all", "adamw"])
def test_step_that_is_not_sound_changes_nothing(optimizer):
    model = GPT(EXPERTS)
    built = build_optimizer(model, optimizer)
    before = weights_after(model, built)
    states = {key: {k: v.clone() for k, v in state.items()} for key, state in built.state.items()}
    give_gradients(model, 9)
    model.h[1].attn.c_proj.weight.grad[0, 0] = torch.nan
    step_if(built, OFF, NO, 1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights().items())
    for key, state in built.state.items():
        assert all(torch.equal(value, states[key][name]) for name, value in state.items())
    give_gradients(model, 9)
    step_if(built, OFF, YES, 1e-3)
    assert not any(torch.equal(weight, before[name]) for name, weight in model.weights().items())


@pytest.mark.parametrize("optimizer", [EVERYTHING, OptimizerConfig()], ids=["muon", "adamw"])
def test_resumed_is_uninterrupted(optimizer, tmp_path):
    model = GPT(EXPERTS)
    state = TrainState(model, build_optimizer(model, optimizer))
    weights_after(model, state.optimizer, 2)
    saved = save_checkpoint(state, tmp_path)
    expected = weights_after(model, state.optimizer)
    other = GPT(EXPERTS, seed=5)
    resumed = TrainState(other, build_optimizer(other, optimizer))
    load_checkpoint(resumed, saved)
    found = weights_after(other, resumed.optimizer)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_rows_become_even():
    update = torch.randn(1, 8, 64) * torch.arange(1, 9)[:, None]
    found = even_rows(update, [torch.zeros(8, 1)], torch.tensor(1.0))
    assert found.norm().item() == pytest.approx(update.norm().item(), rel=1e-4)
    assert found.norm(dim=2).std().item() < 1e-3 * found.norm(dim=2).mean().item()
    square = torch.full((8, 1), 2.0)
    even_rows(update, [square], torch.tensor(1.0))
    torch.testing.assert_close(square, 0.95 * 2.0 + 0.05 * update[0].square().mean(1, keepdim=True))


def test_matrix_follows_the_rule_written_out():
    """Warm-up of the momentum, even rows and cautious decay, of the two matrices in a gated c_fc."""
    config, name = replace(EVERYTHING, matrix_weight_decay=5.0), "h.0.mlp.c_fc.weight"
    model = GPT(MODERN)
    expected = model.weights()[name].clone().view(2, 128, 32)
    optimizer = build_optimizer(model, config, names={name}, stacked=False)
    momentum = square = torch.zeros(())
    for step, beta in enumerate((0.85 + 0.1 / 3, 0.85 + 0.2 / 3, 0.95, 0.95)):
        give_gradients(model, step)
        gradient = dict(model.named_parameters())[name].grad.view(2, 128, 32)
        gradient *= torch.linspace(0.1, 2, 128).roll(40 * step)[:, None]  # rows of other sizes in each step
        gradient = gradient.clone()
        step_if(optimizer, OFF, YES, 1e-3)
        momentum = beta * momentum + (1 - beta) * gradient
        update = orthogonalize(beta * momentum + (1 - beta) * gradient)
        square = 0.95 * square + 0.05 * update.square().mean(2, keepdim=True)
        even = update / square.sqrt()
        update = even * (update.norm(dim=(1, 2)) / even.norm(dim=(1, 2)))[:, None, None]
        shrinks = expected.sign() == update.sign()
        expected = expected - 0.02 * (5.0 * expected * shrinks + 2 * update)  # 2: the root of 128 / 32
    assert (model.weights()[name].view(2, 128, 32) - expected).norm() < 0.02 * expected.norm()


def test_each_kind_of_parameter_has_its_rate():
    rates = {"scalar": 0.1, "embedding": 0.2, "head": 0.3, "matrix": 0.4}
    config = replace(MUON, **{f"{kind}_learning_rate": rate for kind, rate in rates.items()})
    model = GPT(replace(MODERN, value_embeddings="all"))
    optimizer = build_optimizer(model, config)
    weights_after(model, optimizer, 1)
    found = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    expected = {
        **{"wte.weight": 0.2, "h.0.attn.value_embedding.table.weight": 0.2, "lm_head.weight": 0.3},
        **{"h.1.attn.c_attn.weight": 0.4, "h.1.mlp.c_proj.weight": 0.4, "ln_f.weight": 0.1},
        **{"h.0.attn.c_attn.bias": 0.1, "h.0.attn.value_embedding.gate.weight": 1e-3},
    }
    named = dict(model.named_parameters())
    assert {name: found[id(named[name])] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", [OptimizerConfig(), MUON], ids=["adamw", "muon"])
def test_load_of_experts_is_balanced(optimizer):
    model = GPT(replace(EXPERTS, n_layer=1))
    ids = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(0))
    built = build_optimizer(model, optimizer, names={"h.0.mlp.balance"})
    loads = []
    for _ in range(200):
        model.zero_grad()
        next_token_loss(model, ids[:, :-1], ids[:, 1:], "full").backward()
        loads.append(model.h[0].mlp.balance.grad.abs().max().item() / BALANCE_GRADIENT)
        step_if(built, OFF, YES, 2e-5)
    assert max(loads[-20:]) < 0.3 * loads[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"matrix_learning_rate": 0.1}, ["matrix_learning_rate=0.1 needs optimizer=muon"]),
        ({"row_normalization": True}, ["row_normalization=True needs optimizer=muon"]),
        ({"optimizer": "muon", "momentum": 1.0}, ["momentum=1.0"]),
        ({"optimizer": "muon", "matrix_learning_rate": 0.0}, ["matrix_learning_rate=0.0"]),
        ({"optimizer": "muon", "momentum_warmup_steps": 0}, ["momentum_warmup_steps=0"]),
        ({"optimizer": "muon"}, []),
    ],
)
def test_settings_without_meaning_are_refused(changes, words):
    problems = replace(OptimizerConfig(), **changes).problems()
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sharding": "zero1", "precision": "bf16"}, None),
        ({"sharding": "fsdp"}, "sharding=fsdp"),
        ({"sharding": "hsdp"}, "sharding=hsdp"),
        ({"precision": "fp16"}, "precision=fp16"),
        ({"head_learning_rate": 0.1}, "head_learning_rate=0.1 needs tied_head=False"),
        ({"head_learning_rate": 0.1, "tied_head": False}, None),
        ({"cautious_weight_decay": True}, "needs matrix_weight_decay"),
        ({"cautious_weight_decay": True, "matrix_weight_decay": 0.1}, None),
    ],
)
def test_combination_without_meaning_is_named(settings, named):
    recipe = with_settings(Recipe(run_name="x"), optimizer="muon", total_steps=1, **settings)
    assert [named in problem for problem in recipe.problems()] == [True] * (named is not None)
