"""Loss, perplexity and bits per byte over a fixed set of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from overnight.data.stream import Batch
from overnight.loss import LossSum, cross_entropy_nats
from overnight.model.documents import find_documents
from overnight.model.gpt import GPT, evaluating
from overnight.parallel import autocast

LOGITS_AT_ONCE = 1024  # positions: all logits of a batch would take gigabytes, and more time


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on some text, in three units."""

    loss: float
    """Nats per token."""
    perplexity: float
    """e to the loss."""
    bits_per_byte: float
    """Bits for each byte of the text; the only one that compares across tokenizers."""
    evaluated_tokens: int
    """Targets judged, separators between documents included."""
    evaluated_bytes: int
    """Bytes of text that these targets spell; separators spell none."""


def evaluate_language_model(
    model: GPT,
    batches: Iterable[Batch],
    token_bytes: Sequence[bytes],
    precision: str = "fp32",
    boundary: int | None = None,
) -> Evaluation:
    """Judge `model` on every target of `batches`; `token_bytes` says what each id spells.

    A target near the start of its row is judged on a short context, which makes the loss a little
    higher than with a sliding window. `boundary` is the id at which a document begins that is judged by
    itself, for a model that is trained so; None where a row is one text to the model. Training state and
    random state are left as they were. Nats are added up in float64 on the CPU, since Apple's GPUs have no
    float64.
    """
    device = model.wte.weight.device
    lengths = torch.tensor([len(spelt) for spelt in token_bytes])
    total, text_bytes = LossSum(torch.zeros((), dtype=torch.float64), 0), 0
    with evaluating(model), torch.inference_mode(), autocast(device.type, precision):
        for batch in batches:
            ids_BT, targets_N = batch.ids.to(device), batch.targets.to(device).flatten()
            documents = None if boundary is None else find_documents(ids_BT, boundary)
            hidden_NC = model.trunk(ids_BT, documents=documents).flatten(0, 1)
            pieces = (torch.split(each, LOGITS_AT_ONCE) for each in (hidden_NC, targets_N))
            for hidden, targets in zip(*pieces, strict=True):
                nats = cross_entropy_nats(model.head(hidden[None]), targets[None])
                total = total.plus(LossSum(nats.cpu().double(), len(targets)))
            text_bytes += int(lengths[batch.targets].sum())
    if not text_bytes:
        raise ValueError("there is no text to evaluate on: the validation split is empty")
    return Evaluation(
        total.per_token(), total.perplexity(), total.bits_per_byte(text_bytes), total.tokens, text_bytes
    )


def pool_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """Of all their texts together: sums and counts, divided once."""
    tokens = sum(part.evaluated_tokens for part in parts)
    text_bytes = sum(part.evaluated_bytes for part in parts)
    nats = sum(part.loss * part.evaluated_tokens for part in parts)
    total = LossSum(torch.tensor(nats, dtype=torch.float64), tokens)
    return Evaluation(
        total.per_token(), total.perplexity(), total.bits_per_byte(text_bytes), tokens, text_bytes
    )


def evaluation_rows(model: GPT) -> int:
    """Rows of the whole context to judge at once: about 8,192 tokens, whatever the context."""
    return max(1, 8192 // model.config.context_length)
