"""Where the curves of healthy runs lie: for one recipe, one text and one tokenizer."""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, NamedTuple

IDENTITY = (
    *("n_layer", "n_head", "n_embd", "context_length", "vocab_size", "start_from"),
    *("total_steps", "tokens_per_step", "ramp_from_tokens_per_step", "ramp_tokens"),
)
"""Settings without which a run is another experiment."""
SETTINGS = (
    *("dropout", "peak_learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"),
    *("warmup_steps", "learning_rate_decay", "decay_steps", "final_learning_rate_fraction"),
    *("packing", "shuffle_tokens", "validation_fraction", "evaluation_tokens"),
)
"""Settings that move the curves: told where they differ."""
TEXT = ("source", "tokenizer", "tokenizer_fingerprint")
"""Facts of data.json by which a text is known again."""


class Reference(NamedTuple):
    """Where healthy runs lie at one place."""

    low: float
    middle: float
    high: float

    def excess(self, value: float) -> float:
        """How far from the middle: -1 and 1 at the edges. Infinite for what is not finite."""
        if not math.isfinite(value):
            return math.inf
        room = self.high - self.middle if value > self.middle else self.middle - self.low
        return (value - self.middle) / room if room else math.copysign(math.inf, value - self.middle)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity's band over the tokens trained on."""

    tokens: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, tokens: int) -> Reference | None:
        """The band there, in a straight line over the logarithm of the tokens; None outside of the points.

        None, too, between the start and the next point: what falls fast is not known in between.
        """
        index = bisect.bisect_left(self.tokens, tokens)
        if index == len(self.tokens):
            return None
        right = Reference(self.low[index], self.middle[index], self.high[index])
        if self.tokens[index] == tokens:
            return right
        if index == 0 or self.tokens[index - 1] == 0:
            return None
        left = Reference(self.low[index - 1], self.middle[index - 1], self.high[index - 1])
        begin, end = (math.log(self.tokens[place]) for place in (index - 1, index))
        share = (math.log(tokens) - begin) / (end - begin)
        return Reference(
            *((1 - share) * before + share * after for before, after in zip(left, right, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class Band:
    """What runs of one recipe on one text looked like, and how that is known."""

    recipe: str
    """The recipe's name."""
    source: str
    """Where the figures come from, in a few words: "5 recorded runs"."""
    date: str
    notes: str = ""
    """How they were taken, and how the band was widened."""
    identity: Mapping[str, Any]
    """`IDENTITY` of the recipe."""
    settings: Mapping[str, Any]
    """`SETTINGS`, or those of them that the figures were taken with; others are not compared."""
    text: Mapping[str, tuple[str, ...]]
    """For each of `TEXT` what it may be."""
    unigram_nats: float | None
    """Entropy of the training text's single tokens: the loss of knowing nothing of their order."""
    curves: Mapping[str, Curve]
    """By the names of a `Course`; those that are not known are left out."""

    def fits(self, settings: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
        """True for a run with these flat settings on a text with these facts."""
        return all(settings.get(name) == value for name, value in self.identity.items()) and all(
            text.get(name) in known for name, known in self.text.items()
        )

    def differences(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """By name, settings that are not the reference's: "dropout is 0.1, and 0.0 in the reference"."""
        return {
            name: f"{name} is {_said(settings.get(name))}, and {_said(value)} in the reference"
            for name, value in self.settings.items()
            if settings.get(name) != value
        }

    def to_json(self) -> str:
        """The text of a file of bands/."""
        return json.dumps(asdict(self), indent=None) + "\n"


def read_band(text: str) -> Band:
    """The band that `to_json` wrote."""
    values: dict[str, Any] = json.loads(text)
    values["curves"] = {
        name: Curve(**{key: tuple(numbers) for key, numbers in curve.items()})
        for name, curve in values["curves"].items()
    }
    values["text"] = {name: tuple(known) for name, known in values["text"].items()}
    return Band(**values)


@functools.cache
def load_bands() -> tuple[Band, ...]:
    """The bands that come with the package, by name."""
    folder = resources.files("overnight.on_track") / "bands"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return tuple(read_band(entry.read_text("utf-8")) for entry in entries if entry.name.endswith(".json"))


def find_band(
    settings: Mapping[str, Any], text: Mapping[str, Any], bands: Iterable[Band] | None = None
) -> Band | None:
    """The band for a run with these flat settings and the facts of its data.json; None if there is none."""
    known = load_bands() if bands is None else bands
    return next((band for band in known if band.fits(settings, text)), None)


def _said(value: object) -> str:
    return "left out" if value is None else str(value)
