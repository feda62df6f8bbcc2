"""Published results on the same tasks, each with its source. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """A published result. `whose` is the model."""

    whose: str
    value: float
    source: str


OPENAI = ("OpenAI 124M", "OpenAI 355M", "OpenAI 774M", "OpenAI 1558M")
PAPER = "GPT-2 paper, table 3"
GPT3 = "GPT-3 paper, table H.1"
SCRIPT = "build-nanogpt, hellaswag.py"
HARNESS = "lm-eval, as reported in hellaswag.py"


def _paper(*values: float, source: str = PAPER) -> tuple[PublishedResult, ...]:
    """A column of the GPT-2 paper's table 3, by its four sizes."""
    return tuple(PublishedResult(whose, value, source) for whose, value in zip(OPENAI, values, strict=True))


def _gpt3(value: float, note: str = "") -> tuple[PublishedResult, ...]:
    return (PublishedResult("GPT-3 125M", value, f"{GPT3}{note}"),)


REFERENCES: Mapping[tuple[str, str], tuple[PublishedResult, ...]] = {
    ("hellaswag", "accuracy_per_token"): (
        PublishedResult("OpenAI 124M", 0.2955, SCRIPT),
        *_gpt3(0.337),
        PublishedResult("people", 0.956, "Zellers et al. 2019, table 1"),
    ),
    ("hellaswag", "accuracy_by_sum"): (PublishedResult("OpenAI 124M", 0.2859, SCRIPT),),
    ("hellaswag-lm-eval", "accuracy_per_character"): (PublishedResult("OpenAI 124M", 0.3114, HARNESS),),
    ("hellaswag-lm-eval", "accuracy_by_sum"): (PublishedResult("OpenAI 124M", 0.2892, HARNESS),),
    ("arc-easy", "accuracy_per_character"): _gpt3(0.436, ", by its own norm"),
    ("arc-challenge", "accuracy_per_character"): _gpt3(0.266, ", by its own norm"),
    ("openbookqa", "accuracy_per_character"): _gpt3(0.356, ", by its own norm"),
    ("piqa", "accuracy_per_token"): _gpt3(0.646),
    ("winogrande", "accuracy_by_sum"): _gpt3(0.520),
    ("boolq", "accuracy_by_sum"): _gpt3(0.497),
    ("copa", "accuracy_by_sum"): _gpt3(0.660),
    ("cbt-common-nouns", "accuracy_by_sum"): _paper(0.8765, 0.9235, 0.9345, 0.9330),
    ("cbt-named-entities", "accuracy_by_sum"): _paper(0.8340, 0.8710, 0.8800, 0.8905),
    ("lambada", "accuracy"): (
        *_paper(0.4599, 0.5548, 0.6012, 0.6324, source="GPT-2 table 3, stop words out"),
        *_gpt3(0.427),
    ),
    ("lambada", "perplexity_per_word"): (*_paper(35.13, 15.60, 10.87, 8.63), *_gpt3(18.6)),
    ("wikitext-2", "perplexity_per_word"): _paper(29.41, 22.76, 19.93, 18.34),
    ("wikitext-103", "perplexity_per_word"): _paper(37.50, 26.37, 22.05, 17.48),
    ("ptb", "perplexity_per_word"): _paper(65.85, 47.33, 40.31, 35.76),
    ("enwik8", "bits_per_byte"): _paper(1.16, 1.01, 0.97, 0.93),
    ("text8", "bits_per_character"): _paper(1.17, 1.06, 1.02, 0.98),
}
"""By task and metric. The paper calls its sizes 117M, 345M, 762M and 1542M; it does not say how much
context each word had when its perplexities were measured."""

VALIDATION_LOSSES = {
    "fineweb-edu": (PublishedResult("OpenAI 124M", 3.2924, "build-nanogpt, play.ipynb"),),
    "openwebtext": (PublishedResult("OpenAI 124M", 3.12, "nanoGPT, README"),),
}
"""By source, in nats per token of GPT-2's BPE, not comparable across texts. The validation documents of the
others are other samples of the same source."""
