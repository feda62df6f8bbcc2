"""Tasks for `overnight evaluate` and for runs: named, opened, judged, told with their intervals."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.config import nearest
from overnight.distributed.world import World
from overnight.evaluation.result_cache import cache_key, clear_results, evaluate_missing
from overnight.evaluation.scores import AccuracyComparison, LossComparison, Score
from overnight.evaluation.tasks import TASKS, Numbers, Task, TaskResult, evaluate_task, open_task
from overnight.model.gpt import GPT
from overnight.run_directory import cache_folder
from overnight.terminal import progress
from overnight.tokenizer.tokenizer import Tokenizer

VALIDATION = "validation"
HARNESS = "lm-eval:"


@dataclass(frozen=True)
class TaskNames:
    """What is to be judged, by what judges it."""

    validation: bool
    own: tuple[str, ...]
    harness: tuple[str, ...]
    """Tasks of lm-evaluation-harness, by its names."""


def split_names(tasks: Sequence[str]) -> TaskNames:
    """The tasks, said in several words or with commas between them; each once.

    Raises ValueError for one that there is not, with the nearest.
    """
    names = list(dict.fromkeys(name.strip() for word in tasks for name in word.split(",") if name.strip()))
    if not names:
        raise ValueError(f"name a task: {VALIDATION}, {', '.join(TASKS)}, {HARNESS}NAME")
    harness = tuple(name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS))
    others = [name for name in names if not name.startswith(HARNESS)]
    for name in others:
        if name != VALIDATION and name not in TASKS:
            known = [VALIDATION, *TASKS]
            raise ValueError(
                f"there is no task {name} among {', '.join(known)} and {HARNESS}NAME, those of "
                f"lm-evaluation-harness{nearest(name, known)}"
            )
    return TaskNames(VALIDATION in others, tuple(name for name in others if name != VALIDATION), harness)


def evaluate_and_score(
    task: Task, model: GPT, tokenizer: Tokenizer, precision: str, world: World
) -> TaskResult:
    """What the model makes of every example, in their order, with a bar; the same in all processes.

    An evaluation that was interrupted goes on where it was.
    """
    examples = task.encode(tokenizer, model.config.context_length)
    folder = cache_folder() / "judged" / cache_key(model, examples, precision)

    def judge_some(left: Any) -> Iterator[tuple[int, Numbers]]:
        return evaluate_task(model, left, precision, world)

    mine: list[tuple[int, Numbers]] = []
    with progress(task.name, len(examples), "examples") as advance:
        for pair in evaluate_missing(folder, examples, judge_some, world):
            mine.append(pair)
            advance(min(world.size, max(0, len(examples) - world.size * (len(mine) - 1))))
    found = gather(mine, world)
    if world.is_main:
        clear_results(folder)
    return TaskResult(examples, found)


def gather(mine: Iterable[tuple[int, Numbers]], world: World) -> list[Numbers]:
    """What all processes have found, by place."""
    told = world.all_gather_object(json.dumps(list(mine)))
    found = {place: tuple(numbers) for share in told for place, numbers in json.loads(share)}
    return [found[place] for place in range(len(found))]


def describe_score(scores: Sequence[Score]) -> Iterator[str]:
    """The lines of a table of one task, of at most 80 columns."""
    first = scores[0]
    chance = "" if first.chance is None else f", chance {first.chance:.2f}"
    yield f"{first.task}: {first.examples:,} {first.kind}{chance}"
    for each in scores:
        interval = f"{_number(each.interval.low)} to {_number(each.interval.high)}"
        yield _line(each.metric, _number(each.value), f"95% {interval} ({each.interval.method})")
        source = None
        for reference in each.references:
            told = f" ({reference.source})" if reference.source != source else ""
            source = reference.source
            yield _line("", f"{reference.value:g}", f"{reference.whose}{told}")
        if each.against is not None:
            yield from _compare(each.against)
    last = scores[-1].against
    if isinstance(last, LossComparison):
        yield _tell_difference(last, first.kind)


def _line(name: str, number: str, about: str) -> str:
    return f"  {name:<23}{number:<8} {about}"


def describe_briefly(score: Score) -> str:
    """One line: hellaswag accuracy_per_token 0.2912 (0.2713 to 0.3120)."""
    low, high = (_number(end) for end in (score.interval.low, score.interval.high))
    return f"{score.task} {score.metric} {_number(score.value)} ({low} to {high})"


def _compare(rival: AccuracyComparison | LossComparison) -> Iterator[str]:
    if not isinstance(rival, AccuracyComparison):
        yield _line("", _number(rival.value), "the other model")
        return
    alone = f"alone right {rival.only_here:,} here, {rival.only_there:,} there"
    yield _line("", _number(rival.value), f"the other model; {alone}")
    yield _line("", "", f"p = {rival.probability:.3g} (McNemar)")


def _tell_difference(rival: LossComparison, kind: str) -> str:
    """Once for all units: between two models on the same text."""
    if rival.difference is None:
        return "  no paired test: the other model reads the text in other windows"
    low, high = rival.difference.low, rival.difference.high
    per = "word" if kind == "passages" else "token"
    return f"  this less the other: {low:+.4f} to {high:+.4f} nats per {per} (paired bootstrap)"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100_000 else f"{value:.3g}"


def as_values(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The same for a program; JSON has no infinity and no NaN, which are null there."""
    return [scores_to_json(dataclasses.asdict(each)) for each in scores]


def scores_to_json(value: Any) -> Any:
    """Numbers, lists and objects, what is not finite as null."""
    if isinstance(value, dict):
        return {name: scores_to_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [scores_to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_tasks(
    names: Sequence[str], folder: str | None, most: int | None = None, stride: int | None = None
) -> list[Task]:
    """Their files found or fetched, and read; see `open_task`."""
    return [open_task(name, Path(folder) if folder is not None else None, most, stride) for name in names]
