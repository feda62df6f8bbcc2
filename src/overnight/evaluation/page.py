"""Scores as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from overnight.evaluation.scores import AccuracyComparison, LossComparison, Score


def describe_scores(scores: Sequence[Score]) -> Iterator[str]:
    """The lines of one table for each task, at most 80 columns wide."""
    for _, group in groupby(scores, key=lambda score: score.task):
        yield from _describe_task(list(group))


def _describe_task(scores: Sequence[Score]) -> Iterator[str]:
    first, last = scores[0], scores[-1].against
    chance = "" if first.chance is None else f", chance {first.chance:.2f}"
    yield f"{first.task}: {first.examples:,} {first.kind}{chance}"
    for score in scores:
        interval = f"{_number(score.interval.low)} to {_number(score.interval.high)}"
        yield _line(score.metric, _number(score.value), f"95% {interval} ({score.interval.method})")
        source = None
        for reference in score.references:
            cited = f" ({reference.source})" if reference.source != source else ""
            source = reference.source
            yield _line("", f"{reference.value:g}", f"{reference.whose}{cited}")
        if isinstance(score.against, AccuracyComparison):
            differing = f"only right {score.against.only_here:,} here, {score.against.only_there:,} there"
            yield _line("", _number(score.against.value), f"the baseline; {differing}")
            yield _line("", "", f"p = {score.against.probability:.3g} (McNemar)")
        elif score.against is not None:
            yield _line("", _number(score.against.value), "the baseline")
    if isinstance(last, LossComparison):
        if last.difference is None:
            yield "  no paired test: the baseline reads the text in other windows"
        else:
            unit = "word" if first.kind == "passages" else "token"
            ends = f"{last.difference.low:+.4f} to {last.difference.high:+.4f}"
            yield f"  difference to the baseline: {ends} nats per {unit} (paired bootstrap)"


def describe_briefly(score: Score) -> str:
    """One line: hellaswag accuracy_per_token 0.2912 (0.2713 to 0.3120)."""
    low, high = _number(score.interval.low), _number(score.interval.high)
    return f"{score.task} {score.metric} {_number(score.value)} ({low} to {high})"


def _line(name: str, number: str, text: str) -> str:
    return f"  {name:<23}{number:<8} {text}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100_000 else f"{value:.3g}"


def to_json(value: Any) -> Any:
    """`value` with lists for tuples and None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: to_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
