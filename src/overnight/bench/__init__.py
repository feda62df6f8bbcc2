"""A training step timed in variants, from float32 eager to all optimizations, each on top of the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from overnight.renamed import Renamed


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Times variants of a training step, each with one more change, and compares losses with float32."""

    model: str = "gpt2-124m"
    """A published size: gpt2-124m, gpt2-350m, ..., gpt3-125m, ..."""
    variants: tuple[str, ...] | None = None
    """Changes to time, in this order, on top of float32: tf32, bf16, fp16, compile, fused-attention,
    block-attention, pad-vocab, fused-adamw, large-pages, micro-batch, and, only when named, chunked-head,
    fp8-head, activation-checkpointing. All that this machine supports if left out."""
    rows: int | None = None
    """Rows of a micro-batch; if left out 1 on the CPU, elsewhere the most that fit, up to 16."""
    context_length: int | None = None
    """Tokens of a row; the model's if left out."""
    steps: int | None = None
    """Timed steps of each variant, after two to warm up; 3 on the CPU and 5 elsewhere if left out."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    data: str | None = None
    """Text in GPT-2's tokens: a prepared folder, or a source; Python's documentation if left out."""
    out: str | None = None
    """A folder for ladder.json, ladder.md and ladder.svg; none is written if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Renamed(names={"rungs": "variants"})
