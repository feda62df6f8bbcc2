"""Text generation: sampling, key-value cache, quantised weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

EMPTY_STOP = "stop contains an empty text, which would end every completion; leave it out"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn: temperature first, then top-k, then top-p of what top-k kept."""

    temperature: float = 1.0
    """Divides the logits: below 1 more predictable, above 1 more varied; 0 is greedy decoding."""
    top_k: int | None = 50
    """Draw only from this many most likely tokens; None: from all."""
    top_p: float | None = None
    """Draw only from the fewest most likely tokens whose probabilities reach this sum; None: from all."""
    seed: int = 0
    """The same seed, prompt and model give the same text."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if all are valid."""
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature={self.temperature} must be 0 (greedy decoding) or greater")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k} must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must be greater than 0 and at most 1, or None")
        return found


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Continue one or more prompts; the text is streamed to standard output."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    prompts: Positional[tuple[str, ...]] = ()
    """Texts to continue, each in quotes; without any, the model starts a text. `-` alone reads the whole of
    standard input as one prompt; after `--` no word is an option."""
    prompt_file: str | None = None
    """Read a prompt from each line of this file that is not empty; `-` reads standard input."""
    max_new_tokens: int = 128
    """Write at most this many tokens; an end-of-text token ends the completion earlier."""
    samples: int = 1
    """Number of completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Stop strings: texts that end a completion and are not part of it."""
    json: bool = False
    """Print one JSON object for each completion to standard output."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] | None = None
    """Precision of the weights. Default: the device's best (fp16 on most CPUs); int8 takes least memory."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if all are valid."""
        found = super().problems()
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.samples < 1:
            found.append(f"samples={self.samples} must be at least 1")
        if self.prompts and self.prompt_file is not None:
            found.append("give the prompts as words or with --prompt-file, not both")
        if "" in self.stop:
            found.append(EMPTY_STOP)
        return found
