"""Each part beyond GPT-2 against a twin from Transformers, or written out; with a planted mistake."""

from dataclasses import replace

import pytest
import torch

from overnight.conversion.huggingface import write_huggingface
from overnight.evaluation.multiple_choice import Choice, evaluate_choices
from overnight.generation.generate import KVCache
from overnight.generation.quantize import prepare_for_generation
from overnight.model.feed_forward import MixtureOfExperts, _grouped_product
from overnight.model.gpt import GPT, init_weights
from overnight.model.kernels import find_documents
from overnight.model.loss import next_token_loss
from overnight.model.model_config import ModelConfig, parameter_shapes, weight_shapes
from overnight.tokenizer.characters import train_characters
from overnight.training import ComputeConfig
from overnight.training.compute import NextTokenLoss, can_compile, resolve_compute

pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SIZES = ModelConfig(n_layer=3, n_head=4, n_embd=64, context_length=48, vocab_size=97)
SWITCHES = {
    "rotary": {"positions": "rotary"},
    "yarn": {"positions": "rotary", "rotary_scaling": "yarn", "trained_context_length": 16},
    "rms": {"normalization": "rms"},
    "no gains": {"norm_gains": False},
    "no biases": {"biases": False},
    "qk_norm": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "width": {"feed_forward_width": 96},
    "untied": {"tied_head": False},
    "embedding_norm": {"embedding_norm": True},
    "zero_projections": {"zero_projections": True},
    "softcap": {"logit_softcap": 15.0},
    "shortcut": {"embedding_shortcut": True},
    "value embeddings": {"value_embeddings": "alternate"},
    "grouped": {"n_kv_head": 2},
    "windows": {"window_pattern": "SL", "short_window": 7},
    "latent": {"positions": "rotary", "latent_rank": 24, "latent_rotary_channels": 8},
    "latent in windows": {"positions": "rotary", "latent_rank": 24, "window_pattern": "S", "short_window": 7},
    "experts": {"n_expert": 4, "shared_experts": 1},
    "gated experts": {"n_expert": 4, "activation": "swiglu", "balance_rate": 0.0},
    "experts of an odd width": {"n_expert": 4, "feed_forward_width": 37},
}
MODERN = {
    **{"positions": "rotary", "normalization": "rms", "norm_gains": False, "biases": False, "qk_norm": True},
    **{"activation": "relu2", "tied_head": False, "embedding_norm": True, "zero_projections": True},
    **{"logit_softcap": 15.0, "embedding_shortcut": True, "value_embeddings": "alternate"},
}
ALL = {**SWITCHES, "modern": MODERN}


def build(seed: int = 3, **switches) -> GPT:
    """A model in evaluation mode whose weights are all random, zeros and ones included."""
    model = GPT(replace(SIZES, **switches), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.weights().values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def draw_ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_shapes_and_counts_are_those_of_the_module(switches):
    config = replace(SIZES, **switches)
    model = GPT(config)
    assert config.problems() == []
    assert dict(parameter_shapes(config)) == {name: p.shape for name, p in model.named_parameters()}
    assert list(parameter_shapes(config)) == [name for name, _ in model.named_parameters()]
    assert weight_shapes(config) == {name: w.shape for name, w in model.weights().items()}
    assert config.parameter_count() == sum(weight.numel() for weight in model.weights().values())


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_common_weights_are_gpt2_s(switches):
    config = replace(SIZES, **switches)
    gpt2, drawn = dict(init_weights(SIZES, 5)), dict(init_weights(config, 5))
    assert drawn.keys() == weight_shapes(config).keys()
    for name in drawn.keys() & gpt2.keys():
        if drawn[name].shape == gpt2[name].shape and drawn[name].any():
            scale = drawn[name].norm() / gpt2[name].norm()
            torch.testing.assert_close(drawn[name], gpt2[name] * scale)


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_position_does_not_see_later_ones_and_cache_changes_nothing(switches):
    model, ids = build(**switches), draw_ids()
    with torch.inference_mode():
        whole = model(ids)
        changed = ids.clone()
        changed[:, 30:] = 5
        torch.testing.assert_close(model(changed)[:, :30], whole[:, :30], rtol=1e-4, atol=1e-4)
        cache = KVCache(model, [25, 25], 40)
        cache.extend(25)
        found = [model.head(model.trunk(ids[:, :25], cache))]
        for step in range(25, 40):
            cache.extend(1)
            found.append(model.head(model.trunk(ids[:, step : step + 1], cache)))
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
@torch.inference_mode()
def test_rows_of_different_lengths_are_read_as_if_alone(switches):
    model, ids = build(**switches), draw_ids()
    padded = torch.stack([ids[0, :25], torch.cat([ids[1, :7], ids[1, :18]])])  # 18 ids after 7 of padding
    cache = KVCache(model, [25, 18], 40)
    cache.extend(25)
    found = [model.head(model.trunk(padded, cache))[:, -1]]
    for step in range(6):
        cache.extend(1)
        new = torch.stack([ids[0, 25 + step], ids[1, 18 + step]])[:, None]
        found.append(model.head(model.trunk(new, cache))[:, -1])
    for row, length in ((0, 25), (1, 18)):
        alone = model(ids[row : row + 1, : length + 6])[0, length - 1 :]
        torch.testing.assert_close(torch.stack(found)[:, row], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_documents_of_a_row_are_read_as_if_alone(switches):
    model, ids = build(**switches), draw_ids(rows=1)
    ids[0, 1:] = ids[0, 1:].clamp(max=95)
    ids[0, 0] = ids[0, 23] = 96
    with torch.no_grad():
        both = model(ids, find_documents(ids, 96))
        alone = torch.cat([model(ids[:, :23]), model(ids[:, 23:])], dim=1)
    torch.testing.assert_close(both, alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_every_parameter_gets_a_gradient_and_heads_agree(switches):
    model, ids = build(**switches), draw_ids()
    gradients = []
    for method in ("full", "chunked"):
        model.zero_grad()
        nats = next_token_loss(model.train(), ids[:, :-1], ids[:, 1:], method)
        nats.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_generation_and_endings_use_the_model_s_own_head(switches):
    model, ids = build(**switches), draw_ids(1, 24)[0].tolist()
    endings = tuple(map(tuple, (ids[16:], ids[18:], ids[16:19] + ids[:2])))
    ((_, found),) = evaluate_choices(model, [Choice(tuple(ids[:16]), endings, (1, 1, 1), 0)])
    with torch.inference_mode():
        for ending, nats in zip(endings, found, strict=True):
            whole = torch.tensor([ids[:16] + list(ending)])
            expected = next_token_loss(model, whole[:, :-1], whole[:, 1:], "full")
            expected -= next_token_loss(model, whole[:, :15], whole[:, 1:16], "full")
            assert nats == pytest.approx(expected.item(), rel=1e-3), ending
        logits = model(torch.tensor([ids]))
        prepare_for_generation(model, "fp32")
        torch.testing.assert_close(model(torch.tensor([ids])), logits, rtol=1e-3, atol=1e-3)


def test_shortcut_begins_with_a_tenth_of_the_embedding():
    drawn = dict(init_weights(replace(SIZES, embedding_shortcut=True), 5))
    gains = {name.rpartition(".")[2]: weight.item() for name, weight in drawn.items() if "shortcut" in name}
    assert gains == pytest.approx({"stream_gain": 1.0, "embedding_gain": 0.1})


def test_model_with_switches_is_not_written_as_gpt2(tmp_path):
    with pytest.raises(ValueError, match="GPT2LMHeadModel, does not have positions=rotary, qk_norm=True"):
        write_huggingface(build(positions="rotary", qk_norm=True), train_characters(["ab"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"positions": "rotary", "n_head": 64}, ["rotates pairs: n_embd / n_head must be even, not 1"]),
        ({"rotary_scaling": "yarn"}, ["needs positions=rotary", "needs trained_context_length"]),
        ({"positions": "rotary", "trained_context_length": 16}, ["needs rotary_scaling=yarn"]),
        ({**SWITCHES["yarn"], "trained_context_length": 64}, ["is more than context_length=48"]),
        ({"n_kv_head": 3}, ["n_head=4 must be a multiple of n_kv_head=3"]),
        ({"short_window": 4}, ["needs a window_pattern with S"]),
        ({"window_pattern": "SX"}, ["must be made of S and L"]),
        ({"latent_rank": 8}, ["needs positions=rotary"]),
        ({"latent_rotary_channels": 4}, ["needs latent_rank"]),
        ({**SWITCHES["latent"], "latent_rotary_channels": 16}, ["must be at least 1 and less than n_embd"]),
        ({**SWITCHES["latent"], "n_head": 64, "latent_rotary_channels": None}, ["at least 1 and less than"]),
        ({**SWITCHES["latent"], "latent_rotary_channels": 3}, ["latent_rotary_channels must be even, not 3"]),
        (
            {**SWITCHES["latent"], "qk_norm": True, "n_kv_head": 2},
            ["qk_norm=True can't be used with", "n_kv_head=2 can't"],
        ),
        ({"n_expert": 4, "experts_per_token": 5}, ["experts_per_token=5 is more than n_expert=4"]),
        ({"shared_experts": 1, "balance_rate": 0.1}, ["shared_experts=1 needs", "balance_rate=0.1 needs"]),
        ({"n_expert": 1}, ["n_expert=1 must be at least 2"]),
        ({"logit_softcap": 0.0, "rotary_base": -1.0}, ["rotary_base=-1.0", "logit_softcap=0.0"]),
        ({**SWITCHES["yarn"], "rotary_base": 1.0}, ["rotary_base=1.0 must be greater than 1"]),
        ({"logit_softcap": 1e300}, ["at most 1e+06"]),
        ({"n_kv_head": 3, "window_pattern": "x"}, ["window_pattern='x'", "n_kv_head=3"]),
        ({"n_head": 3, "n_kv_head": 2}, ["n_embd=64 does not divide", "n_head=3 must be a multiple"]),
        ({"n_head": 0, "n_expert": 2, "experts_per_token": 3}, ["n_head=0", "is more than n_expert=2"]),
    ],
)
def test_switches_without_meaning_are_all_named(switches, words):
    problems = replace(SIZES, **switches).problems()
    assert len(problems) == len(words), problems
    assert all(word in problem for word, problem in zip(words, problems, strict=True)), problems


@pytest.mark.parametrize("method", ["full", "chunked"])
def test_first_loss_is_that_of_guessing(method):
    model, ids = GPT(replace(SIZES, **MODERN)), draw_ids()
    nats = next_token_loss(model, ids[:, :-1], ids[:, 1:], method) / ids[:, 1:].numel()
    assert nats.item() == pytest.approx(torch.tensor(97.0).log().item(), abs=0.01)


@pytest.mark.parametrize("switches", [*SWITCHES.values(), MODERN | {"tied_head": True}])
def test_first_loss_of_every_part_is_near_guessing(switches):
    model, ids = GPT(replace(SIZES, **switches)), draw_ids()
    nats = next_token_loss(model, ids[:, :-1], ids[:, 1:], "full") / ids[:, 1:].numel()
    assert nats.item() == pytest.approx(torch.tensor(97.0).log().item(), abs=0.1)


def compute_loss(model: GPT, ids: torch.Tensor, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """Nats per token, and the gradient of every parameter."""
    compute = resolve_compute(ComputeConfig(**{"precision": "fp32", "compile": False, **settings}), "cpu")
    model.train().zero_grad()
    loss = NextTokenLoss(model, compute)(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def off_by(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The distance of two gradients, relative to the norm of the second."""
    squares = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return (squares / sum(float(part.square().sum()) for part in truth.values())) ** 0.5


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_activation_checkpointing_changes_no_bit(switches):
    model, ids = build(**switches), draw_ids()
    kept = compute_loss(model, ids)
    for mode in ("selective", "block"):
        again = compute_loss(model, ids, activation_checkpointing=mode)
        assert again[0] == kept[0]
        assert all(torch.equal(again[1][name], kept[1][name]) for name in kept[1])


@pytest.mark.parametrize("switches", ALL.values(), ids=ALL)
def test_bfloat16_changes_the_loss_by_its_rounding(switches):
    model, ids = build(**switches), draw_ids()
    nats, gradients = compute_loss(model, ids)
    short, short_gradients = compute_loss(model, ids, precision="bf16")
    assert short == pytest.approx(nats, rel=0.02)
    assert all(gradient.isfinite().all() for gradient in short_gradients.values())
    assert 1e-5 < off_by(short_gradients, gradients) < 0.15


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["modern", "experts"])
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_loss_is_the_same_loss(name, precision):
    """The whole loss is one graph: NextTokenLoss compiles with fullgraph."""
    torch._dynamo.reset()
    model, ids = build(n_layer=2, **ALL[name]), draw_ids()
    nats, gradients = compute_loss(model, ids, precision=precision)
    compiled, compiled_gradients = compute_loss(model, ids, precision=precision, compile=True)
    assert compiled == pytest.approx(nats, rel=1e-6 if precision == "fp32" else 2e-3)
    assert off_by(compiled_gradients, gradients) < (1e-5 if precision == "fp32" else 0.15)


def test_products_of_experts_are_those_of_torch_s_kernel():
    """In bfloat16 torch multiplies all experts at once, elsewhere we multiply one after the other."""
    generator, results = torch.Generator().manual_seed(7), []
    rows, weight = torch.randn(30, 16, generator=generator), torch.randn(4, 24, 16, generator=generator)
    ends, gradient = (
        torch.tensor([11, 11, 19, 30], dtype=torch.int32),
        torch.randn(30, 24, generator=generator),
    )
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [part.to(dtype, copy=True).requires_grad_() for part in (rows, weight)]
        product = _grouped_product(*leaves, ends)
        product.backward(gradient.to(dtype))
        results.append([product.detach(), *(leaf.grad for leaf in leaves)])
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.15)
    torch.testing.assert_close(results[0][0][11:19], rows[11:19] @ weight[2].T)
    assert not results[0][2][1].any(), "the expert without rows"


# ---------------------------------------------------------------- balance of experts


def build_unbalanced() -> MixtureOfExperts:
    """The router prefers expert 0 for nearly every token."""
    part = MixtureOfExperts(replace(SIZES, n_expert=8, experts_per_token=2))
    generator = torch.Generator().manual_seed(4)
    for weight in part.parameters():
        weight.data.normal_(0, 0.1, generator=generator)
    part.balance.data.zero_()
    part.router.data[0] += 0.2
    return part


def load_of(part: MixtureOfExperts, x_BTC: torch.Tensor) -> torch.Tensor:
    """The share of the tokens that each expert gets, times their number: 1 if the load is even."""
    chosen = part.choose(x_BTC.flatten(0, 1))[0]
    return torch.bincount(chosen.flatten(), minlength=part.experts) * part.experts / chosen.numel()


def test_steps_against_the_sign_of_its_gradient_balance_the_load():
    part, generator = build_unbalanced(), torch.Generator().manual_seed(5)
    held_out = torch.randn(8, 256, 64, generator=generator) + 0.3
    assert load_of(part, held_out).max() > 3
    unbiased, router = part.choose(held_out.flatten(0, 1)), part.router.clone()
    for step in range(150):
        part.zero_grad()
        part(torch.randn(4, 128, 64, generator=generator) + 0.3).sum().backward()
        with torch.no_grad():
            part.balance -= 0.01 * (1 - step / 150) * part.balance.grad.sign()
    load = load_of(part, held_out)
    assert load.min() > 0.75
    assert load.max() < 1.25
    expert, share = part.choose(held_out.flatten(0, 1))
    same = (expert.sort(dim=1).values == unbiased[0].sort(dim=1).values).all(dim=1)
    assert 0.02 < same.float().mean() < 0.98
    # The bias is no part of the weights.
    torch.testing.assert_close(share[same].sort().values, unbiased[1][same].sort().values)
    assert torch.equal(part.router, router)


def test_gradient_of_the_balance_is_the_load_summed_over_micro_batches():
    part, x_BTC = build_unbalanced(), torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(6))
    part(x_BTC).sum().backward()
    whole = part.balance.grad.clone()
    load = load_of(part, x_BTC)
    torch.testing.assert_close(whole.sign(), (load - 1).sign())
    torch.testing.assert_close(whole / whole.norm(), (load - 1) / (load - 1).norm())
    part.zero_grad()
    for scale, rows in ((1.0, x_BTC[:1]), (1024.0, x_BTC[1:])):  # a scaled loss counts tokens all the same
        (scale * part(rows).sum()).backward()
    torch.testing.assert_close(part.balance.grad, whole, rtol=1e-6, atol=0)
    others = [p.grad.norm() for name, p in part.named_parameters() if name != "balance"]
    assert whole.norm() < 1e-10 * min(others), "clipping would notice it"
