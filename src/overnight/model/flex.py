"""Attention within documents on a GPU: flex_attention, which leaves out blocks that no document spans.

Shapes: B rows, T positions, H heads, D channels a head, N blocks of 128 positions of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions: flex_attention's own block
LEAST_CHANNELS = 16  # of a head, that its kernel multiplies


def attend_in_flex(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """Causal attention within documents. To be compiled: eager, it writes the whole square down.

    flex_attention has no dropout. The layers of a model build the same mask, which a compiler builds once.
    """
    assert not dropout_p
    mixed_BHTD: Tensor = flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=build_block_mask(document_BT))
    return mixed_BHTD


def attend_in_compiled_flex(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, document_BT: Tensor, *, dropout_p: float = 0.0
) -> Tensor:
    """The same, compiled by itself: for a training step that is not."""
    mixed_BHTD: Tensor = _compile()(q_BHTD, k_BHTD, v_BHTD, document_BT, dropout_p=dropout_p)
    return mixed_BHTD


@functools.cache
def _compile() -> Callable[..., Tensor]:
    """Made when it is first needed: to load the compiler takes two seconds."""
    return torch.compile(attend_in_flex, dynamic=False, fullgraph=True)


def build_block_mask(document_BT: Tensor) -> BlockMask:
    """Which blocks of keys a block of queries meets, wholly or in part; the same for all heads.

    Numbers of documents rise along a row, so a block's first and last say all: no square of T is formed.
    """
    B, T = document_BT.shape
    padding = -T % BLOCK
    # A number that no document has: a block that is padded is never whole, and nothing looks into it.
    padded_BT = F.pad(document_BT, (0, padding), value=T + 1)
    blocks_BNP = padded_BT.view(B, -1, BLOCK)
    first_BN, last_BN = blocks_BNP[..., 0], blocks_BNP[..., -1]
    place_N = torch.arange(blocks_BNP.shape[1], device=document_BT.device)
    before_NN = place_N[:, None] > place_N  # queries stand in rows, keys in columns
    whole_BNN = before_NN & (first_BN[:, None, :] == last_BN[:, :, None])
    met_BNN = before_NN & (last_BN[:, None, :] >= first_BN[:, :, None])
    in_part_BNN = (met_BNN & ~whole_BNN) | (place_N[:, None] == place_N)

    def may_look(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (padded_BT[row, query] == padded_BT[row, key])

    return BlockMask.from_kv_blocks(
        *_listed(in_part_BNN), *_listed(whole_BNN), BLOCK_SIZE=BLOCK, mask_mod=may_look, seq_lengths=(T, T)
    )


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen (B, 1, N), and which: these come first in (B, 1, N, N)."""
    numbers = chosen_BNN.sum(-1, dtype=torch.int32)
    places = torch.argsort(chosen_BNN.int(), dim=-1, descending=True, stable=True).int()
    return numbers[:, None], places[:, None]
