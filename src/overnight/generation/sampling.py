"""Logits to the next id: temperature, top-k, top-p, and noise that is a hash of (seed, row, position).

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from overnight.generation import SamplingConfig


def noise(seed: int, row: int, position: int) -> float:
    """A uniform number in [0, 1): a hash of (seed, row, position), so sampling needs no state.

    A row's text therefore does not depend on the size and the other rows of its batch.
    """
    digest = blake2b(f"{seed} {row} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52  # 52 bits: noise * total rounds to below total


def sample(
    logits_BV: Tensor, config: SamplingConfig, rows: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Draw one id for each row, int64 (B,); `rows` and `positions` seed its noise.

    The ids are on the logits' device, or on the CPU for MPS. Raises FloatingPointError for logits that are
    not finite. Ties at the edge of top-k are broken by torch; at the edge of top-p all are kept.
    """
    if logits_BV.device.type == "mps":  # it has no float64
        logits_BV = logits_BV.cpu()
    # A sum finds any NaN or infinity, thirty times faster than isfinite; float64 cannot overflow.
    if not torch.isfinite(logits_BV.sum(dtype=torch.float64)):
        raise FloatingPointError(
            "the model's logits are NaN or infinite: its weights are damaged or its training "
            "diverged; use an earlier checkpoint"
        )
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    ids_BK = None  # column k is id k
    if config.top_k is not None and config.top_k < logits_BV.shape[-1]:
        logits_BV, ids_BK = logits_BV.topk(config.top_k)
    # At most 0, and in float64: no temperature can overflow the exponential.
    below_BK = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).double()
    weights_BK = (below_BK / config.temperature).exp()
    if config.top_p is not None:
        least_B1 = _least_weight_kept(weights_BK, config.top_p)
        weights_BK = weights_BK.where(weights_BK >= least_B1, 0.0)
    cumulative_BK = weights_BK.cumsum(dim=-1)
    drawn = [[noise(config.seed, row, position)] for row, position in zip(rows, positions, strict=True)]
    drawn_B1 = torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device)
    chosen_B1 = torch.searchsorted(cumulative_BK, drawn_B1 * cumulative_BK[:, -1:], right=True)
    return (chosen_B1 if ids_BK is None else ids_BK.gather(-1, chosen_B1)).squeeze(-1)


def _least_weight_kept(weights_BK: Tensor, top_p: float) -> Tensor:
    """The smallest of the fewest weights that together reach `top_p` of all, (B, 1).

    A few hundred of 50,257 usually suffice; topk finds them fifteen times faster than a sort of all.
    """
    wanted_B1 = top_p * weights_BK.sum(dim=-1, keepdim=True)
    descending = weights_BK.topk(min(512, weights_BK.shape[-1])).values
    if (descending.sum(dim=-1, keepdim=True) < wanted_B1).any():
        if weights_BK.device.type == "cpu":  # numpy sorts twice as fast as torch
            descending = torch.from_numpy(np.sort(weights_BK.detach().numpy(), axis=-1)).flip(-1)
        else:
            descending = weights_BK.sort(dim=-1, descending=True).values
    last_B1 = torch.searchsorted(descending.cumsum(dim=-1), wanted_B1)
    return descending.gather(-1, last_B1.clamp(max=descending.shape[-1] - 1))
