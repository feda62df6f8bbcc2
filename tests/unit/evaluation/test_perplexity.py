from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from overnight.data.loader import Batch
from overnight.evaluation.perplexity import evaluate_language_model, pool_evaluations
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig

V, T = 40, 8
SPELT = [b""] + [b"x" * (1 + number % 3) for number in range(V - 1)]  # id 0 separates documents


@pytest.fixture
def model() -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=V, dropout=0.5))
    initialize(model, seed=0)
    return model.train()


def rows(ids: torch.Tensor, count: int) -> list[Batch]:
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


def one_at_a_time(model: GPT, ids: torch.Tensor) -> float:
    """Mean nats, from the definition: each target under the row that stands before it."""
    nats = 0.0
    for target in range(1, len(ids)):
        start = (target - 1) // T * T
        logits = model.eval()(ids[None, start:target])[0, -1].double()
        nats -= logits.log_softmax(0)[ids[target]].item()
    return nats / (len(ids) - 1)


@torch.no_grad()
def test_every_target_counts_once_however_the_rows_are_batched(model: GPT) -> None:
    ids = torch.randint(V, (61,), generator=torch.Generator().manual_seed(3))
    expected = one_at_a_time(model, ids)
    for count in (1, 3, 7):
        found = evaluate_language_model(model, rows(ids, count), SPELT)
        assert found.loss == pytest.approx(expected, abs=1e-5)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
        assert found.evaluated_tokens == 60
        assert found.evaluated_bytes == sum(len(SPELT[number]) for number in ids[1:])
        assert found.bits_per_byte == pytest.approx(
            expected * 60 / math.log(2) / found.evaluated_bytes, rel=1e-5
        )


@torch.no_grad()
def test_a_mean_of_batch_means_would_be_another_number(model: GPT) -> None:
    """The negative control: the last batch is short, so averaging averages is wrong by a visible amount."""
    ids = torch.randint(V, (20,), generator=torch.Generator().manual_seed(3))
    batches = rows(ids, 2)
    means = [evaluate_language_model(model, [batch], SPELT).loss for batch in batches]
    assert sum(means) / len(means) != pytest.approx(
        evaluate_language_model(model, batches, SPELT).loss, abs=1e-5
    )


def test_judging_changes_nothing(model: GPT) -> None:
    state = torch.random.get_rng_state()
    evaluate_language_model(model, rows(torch.randint(V, (20,), generator=torch.Generator()), 2), SPELT)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()  # and training goes on


def test_nats_become_float64_on_the_cpu(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Apple GPU has no float64; of its tensors, only the way to the CPU is played here."""
    nats = SimpleNamespace(item=lambda: 30.0)
    monkeypatch.setattr("overnight.evaluation.perplexity.cross_entropy_nats", lambda *_: nats)
    ids = torch.randint(V, (21,), generator=torch.Generator().manual_seed(3))
    assert evaluate_language_model(model, rows(ids, 1), SPELT).loss == 3 * 30 / 20


@pytest.mark.gpu
def test_a_gpu_judges_as_the_cpu_does(model: GPT) -> None:
    ids = torch.randint(V, (61,), generator=torch.Generator().manual_seed(3))
    on_cpu = evaluate_language_model(model, rows(ids, 3), SPELT)
    on_gpu = evaluate_language_model(model.to("cuda"), rows(ids, 3), SPELT)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, abs=1e-4)


def test_no_text_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="no text"):
        evaluate_language_model(model, [], SPELT)


@torch.no_grad()
def test_several_texts_pooled_are_one_text(model: GPT) -> None:
    generator = torch.Generator().manual_seed(4)
    short, long = (rows(torch.randint(V, (count,), generator=generator), 2) for count in (9, 90))
    whole = evaluate_language_model(model, [*short, *long], SPELT)
    parts = [evaluate_language_model(model, each, SPELT) for each in (short, long)]
    pooled = pool_evaluations(parts)
    assert vars(pooled) == pytest.approx(vars(whole), rel=1e-12)
    assert pooled.loss != pytest.approx((parts[0].loss + parts[1].loss) / 2, rel=1e-3)  # no mean of means
