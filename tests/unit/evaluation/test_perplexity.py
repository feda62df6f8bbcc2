"""The loss of a text against its definition."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from overnight.data.loader import Batch
from overnight.evaluation.perplexity import Evaluation, evaluate_language_model, pool_losses
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

V, T = 40, 8
TOKEN_BYTES = [b""] + [b"x" * (1 + number % 3) for number in range(V - 1)]  # id 0 separates documents


@pytest.fixture
def dropping() -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V, dropout=0.5))
    initialize(model, seed=0)
    return model.train()


def draw_ids(count: int, seed: int = 3) -> Tensor:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(seed))


def rows(ids: Tensor, count: int) -> list[Batch]:
    """`ids` as batches of `count` rows of T, then one shorter row."""
    targets = len(ids) - 1
    full = targets // T
    batches = [
        Batch(ids[a * T : b * T].view(-1, T), ids[a * T + 1 : b * T + 1].view(-1, T))
        for a in range(0, full, count)
        if (b := min(a + count, full))
    ]
    if targets % T:
        batches.append(Batch(ids[full * T : -1][None], ids[full * T + 1 :][None]))
    return batches


def naive(model: GPT, ids: Tensor) -> float:
    """Mean nats by definition: each target after the ids before it in its row."""
    nats = 0.0
    for target in range(1, len(ids)):
        start = (target - 1) // T * T
        logits = model.eval()(ids[None, start:target])[0, -1].double()
        nats -= logits.log_softmax(0)[ids[target]].item()
    return nats / (len(ids) - 1)


def evaluate(model: GPT, batches: list[Batch]) -> Evaluation:
    return evaluate_language_model(model, batches, TOKEN_BYTES).summary()


@pytest.mark.parametrize("count", [1, 3, 7])
@torch.no_grad()
def test_loss_does_not_depend_on_batches(dropping: GPT, count: int) -> None:
    ids = draw_ids(61)
    wanted = naive(dropping, ids)
    found = evaluate(dropping, rows(ids, count))
    assert found.loss == pytest.approx(wanted, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted), rel=1e-5)
    assert found.evaluated_tokens == 60
    assert found.evaluated_bytes == sum(len(TOKEN_BYTES[number]) for number in ids[1:])
    assert found.bits_per_byte == pytest.approx(wanted * 60 / math.log(2) / found.evaluated_bytes, rel=1e-5)


def test_evaluation_leaves_training_state_unchanged(dropping: GPT) -> None:
    state = torch.random.get_rng_state()
    evaluate(dropping, rows(draw_ids(20), 2))
    assert dropping.training
    assert torch.equal(torch.random.get_rng_state(), state)
    dropping(torch.zeros(1, 4, dtype=torch.long)).sum().backward()


def test_nats_are_summed_on_the_cpu(dropping: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no float64."""
    nats = SimpleNamespace(item=lambda: 30.0)
    monkeypatch.setattr("overnight.evaluation.perplexity.cross_entropy_nats", lambda *_: nats)
    assert evaluate(dropping, rows(draw_ids(21), 1)).loss == 3 * 30 / 20


@pytest.mark.gpu
def test_gpu_loss_matches_cpu(dropping: GPT) -> None:
    on_cpu = evaluate(dropping, rows(draw_ids(61), 3))
    on_gpu = evaluate(dropping.to("cuda"), rows(draw_ids(61), 3))
    assert on_gpu.loss == pytest.approx(on_cpu.loss, abs=1e-4)


@torch.no_grad()
def test_pooled_evaluations_match_one_text(dropping: GPT) -> None:
    short, long = rows(draw_ids(9, 4), 2), rows(draw_ids(90, 5), 2)
    whole = evaluate(dropping, [*short, *long])
    parts = [evaluate_language_model(dropping, each, TOKEN_BYTES) for each in (short, long)]
    pooled = pool_losses(parts).summary()
    assert vars(pooled) == pytest.approx(vars(whole), rel=1e-12)
    control = sum(part.summary().loss for part in parts) / 2
    assert pooled.loss != pytest.approx(control, rel=1e-3)
    with pytest.raises(ValueError, match="empty"):
        evaluate(dropping, [])
