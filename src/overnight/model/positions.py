"""Positions: GPT-2's embedding of them, or rotary (Su et al. 2021, arXiv 2104.09864; YaRN: arXiv 2309.00071).

Rotary: channel i of a head is paired with channel i + D / 2, and the pair is rotated by position times
frequency i. A product of a query and a key then depends on the difference of their positions only.

Shapes: B rows, T positions, H heads, D channels a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overnight.model.fused import rotate_halves
from overnight.model.model_config import ModelConfig

FAST_ROTATIONS, SLOW_ROTATIONS = 32, 1  # YaRN, section 3.2: beta and alpha, in the trained context


class LearnedPositions(nn.Module):
    """GPT-2's embedding of positions, added to the embedding of ids."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.context_length, config.n_embd))

    def forward(self, x_BTC: Tensor, positions: Tensor | None) -> tuple[Tensor, None]:
        """The sum; `positions` are (T,) or (B, T), None: 0 to T - 1."""
        added = self.weight[: x_BTC.shape[1]] if positions is None else F.embedding(positions, self.weight)
        return x_BTC + added, None


class Rotation(NamedTuple):
    """Of every angle, float32, (T, D) or (B, 1, T, D): both halves alike, `sine` negated in the first."""

    cosine: Tensor
    sine: Tensor


class RotaryPositions(nn.Module):
    """The rotation of each position; the embedding is not changed. No parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frequencies = rotary_frequencies(config)
        self.magnitude = 1.0
        if config.rotary_scaling == "yarn":
            self.magnitude = 0.1 * math.log(_stretch(config)) + 1.0  # YaRN, section 3.4

    def forward(self, x_BTC: Tensor, positions: Tensor | None) -> tuple[Tensor, Rotation]:
        """The unchanged embedding, and the rotations of `positions`, (T,) or (B, T); None: 0 to T - 1."""
        if positions is None:
            positions = torch.arange(x_BTC.shape[1], device=x_BTC.device)
        frequencies = torch.tensor(self.frequencies, device=x_BTC.device)
        angles = positions[..., None].float() * frequencies
        if angles.dim() == 3:
            angles = angles[:, None]
        cosine, sine = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return x_BTC, Rotation(torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1))


def rotate(x_BHTD: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys; float32."""
    return rotate_halves(x_BHTD, *rotation)


def rotary_frequencies(config: ModelConfig) -> tuple[float, ...]:
    """Radians a position of each pair of channels, rounded as Transformers rounds them."""
    D = config.rotary_channels
    exponents = torch.arange(0, D, 2, device="cpu").float() / D
    periods = config.rotary_base**exponents
    frequencies = 1.0 / periods
    if config.rotary_scaling == "yarn":
        # Fast pairs keep their frequency, slow ones are stretched, those between change linearly.
        kept = 1.0 - _ramp(config)
        frequencies = 1.0 / (_stretch(config) * periods) * (1.0 - kept) + frequencies * kept
    return tuple(frequencies.tolist())


def _stretch(config: ModelConfig) -> float:
    assert config.trained_context_length is not None, "ModelConfig.problems asks for it"
    return config.context_length / config.trained_context_length


def _ramp(config: ModelConfig) -> Tensor:
    """The share by which the frequency of each pair is stretched, (D / 2,), from 0 to 1."""
    D, trained = config.rotary_channels, config.trained_context_length

    def channel(rotations: float) -> float:
        """The pair that makes this number of rotations within the trained context."""
        assert trained is not None
        return D * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    low = max(math.floor(channel(FAST_ROTATIONS)), 0)
    high = min(math.ceil(channel(SLOW_ROTATIONS)), D - 1)
    width = high - low or 0.001  # as in the paper's code
    return ((torch.arange(D // 2, device="cpu").float() - low) / width).clamp(0, 1)
