"""A model's accuracy on a multiple-choice task, three ways, with its interval and what others reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overnight.evaluation.choices import Judged
from overnight.evaluation.intervals import Interval, mcnemar, wilson

METRICS = {
    "accuracy_per_token": "by_token",
    "accuracy_per_character": "by_character",
    "accuracy_by_sum": "by_sum",
}
"""Per token is build-nanogpt's, per character lm-eval's acc_norm, by sum both's plain accuracy."""


class Reference(NamedTuple):
    """What somebody reached, or what needs no model."""

    whose: str
    value: float
    source: str


GPT3 = "GPT-3 paper, table H.1, zero-shot"
SCRIPT = "build-nanogpt, hellaswag.py, of gpt2"
HARNESS = "lm-evaluation-harness, of gpt2, as hellaswag.py of build-nanogpt has it"
REFERENCES = {
    ("hellaswag", "accuracy_per_token"): (
        Reference("OpenAI 124M", 0.2955, SCRIPT),
        Reference("GPT-3 125M", 0.337, GPT3),
        Reference("people", 0.956, "Zellers et al. 2019, table 1"),
    ),
    ("hellaswag", "accuracy_per_character"): (Reference("OpenAI 124M", 0.3114, HARNESS),),
    ("hellaswag", "accuracy_by_sum"): (
        Reference("OpenAI 124M", 0.2859, SCRIPT),
        Reference("the same", 0.2892, HARNESS),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One metric of one task."""

    task: str
    metric: str
    right: int
    questions: int
    interval: Interval
    chance: float
    references: tuple[Reference, ...]
    against: Comparison | None = None

    @property
    def value(self) -> float:
        """The share of questions that are answered rightly."""
        return self.right / self.questions


@dataclass(frozen=True)
class Comparison:
    """Another model on the same questions."""

    right: int
    only_here: int
    """Questions that it does not answer rightly, and this one does."""
    only_there: int
    probability: float
    """That two models that are as good differ at least so much (McNemar)."""


def sum_up(
    task: str, judged: Sequence[Judged], chance: float, against: Sequence[Judged] | None = None
) -> list[Accuracy]:
    """The accuracies of a task from its questions; `against` are the same ones, judged by another model."""
    found = []
    for metric, way in METRICS.items():
        here = [bool(getattr(each, way)) for each in judged]
        there = None if against is None else [bool(getattr(each, way)) for each in against]
        found.append(
            Accuracy(
                task=task,
                metric=metric,
                right=sum(here),
                questions=len(here),
                interval=wilson(sum(here), len(here)),
                chance=chance,
                references=REFERENCES.get((task, metric), ()),
                against=None if there is None else compare(here, there),
            )
        )
    return found


def compare(here: Sequence[bool], there: Sequence[bool]) -> Comparison:
    """Two models on the same questions, in the same order."""
    only_here = sum(one and not other for one, other in zip(here, there, strict=True))
    only_there = sum(other and not one for one, other in zip(here, there, strict=True))
    return Comparison(sum(there), only_here, only_there, mcnemar(only_here, only_there))
