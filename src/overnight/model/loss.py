"""A loss is a sum and a count: add both over micro-batches, ranks and evaluation batches; divide once.

Shapes: B rows, T positions, N rows times positions, C channels, V rows of the padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.model import LossMethod
from overnight.model.fused import soft_cap
from overnight.model.gpt import GPT
from overnight.model.kernels import find_documents
from overnight.model.loss_kernels import ChunkedLoss, Fp8Product


def cross_entropy_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of all targets, summed: a float32 scalar in nats.

    Computed in float32 for any precision of the logits, since it is a sum of many small terms.
    """
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


def head_loss(
    hidden_BTC: Tensor,
    weight_VC: Tensor,
    targets_BT: Tensor,
    method: LossMethod,
    vocab_size: int,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of all targets given the hidden states, summed: a float32 scalar in nats.

    Rows of the weight from `vocab_size` on are padding: they get no probability and no gradient. `full`
    computes all logits at once; `chunked` those of some positions at a time, so that memory holds one
    chunk's; `fp8` computes the output layer's three products in 8 bits. `softcap` bounds the logits.
    """
    if method == "full":
        logits_BTV = F.linear(hidden_BTC, weight_VC)[..., :vocab_size]
        return cross_entropy_nats(soft_cap(logits_BTV, softcap), targets_BT)
    hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
    if method == "fp8":
        logits_NV: Tensor = Fp8Product.apply(hidden_NC, weight_VC)  # type: ignore[no-untyped-call]
        return cross_entropy_nats(soft_cap(logits_NV[None, :, :vocab_size], softcap), targets_N[None])
    nats: Tensor = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NC, weight_VC, targets_N, (vocab_size, softcap), torch.is_grad_enabled()
    )
    return nats


def next_token_loss(
    model: GPT, ids_BT: Tensor, targets_BT: Tensor, method: LossMethod, document_separator: int | None = None
) -> Tensor:
    """The pretraining loss: cross-entropy of every next token, summed, in nats.

    `document_separator` is the id that begins a document; attention then stays within documents. None: a
    row attends to all of its earlier positions.
    """
    documents = None if document_separator is None else find_documents(ids_BT, document_separator)
    hidden_BTC = model.trunk(ids_BT, documents=documents)
    sizes = model.vocab_size, model.config.logit_softcap
    return head_loss(hidden_BTC, model.lm_head.weight, targets_BT, method, *sizes)
