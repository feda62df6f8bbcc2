"""A loss is a sum and a count: add both over micro-batches, ranks and evaluation batches; divide once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LossSum(NamedTuple):
    """Cross-entropy in nats, summed over `tokens` targets."""

    nats: Tensor
    """A scalar, float32 or float64."""
    tokens: int
    """How many targets were summed."""

    def plus(self, other: LossSum) -> LossSum:
        """Both sums together (a NamedTuple's own `+` would join them end to end)."""
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)

    def per_token(self) -> float:
        """Mean nats per token. Waits for the device."""
        return self.nats.item() / self.tokens

    def perplexity(self) -> float:
        """Exponential of the mean; infinite beyond 709 nats per token, where a float ends."""
        try:
            return math.exp(self.per_token())
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits needed for each byte of the text that the targets spell: comparable across tokenizers."""
        return self.nats.item() / math.log(2) / text_bytes


def cross_entropy_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Minus the log-likelihood of every target under the logits at its place, summed; float32 scalar, nats.

    Computed in float32 whatever the precision of the logits: a sum of many small terms.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
