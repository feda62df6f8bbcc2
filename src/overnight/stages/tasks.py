"""`overnight evaluate --tasks`: multiple-choice tasks, told with their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.settings import nearest
from overnight.terminal import progress

if TYPE_CHECKING:
    from overnight.evaluation.choices import Choice, Judged
    from overnight.evaluation.multiple_choice import Accuracy
    from overnight.model.gpt import GPT
    from overnight.stages.models import OpenedModel

VALIDATION = "validation"


def split_names(tasks: Sequence[str]) -> list[str]:
    """The tasks, said in several words or with commas between them; each once.

    Raises ValueError for one that there is not, with the nearest.
    """
    from overnight.evaluation.questions import CHOICE_TASKS

    names = [name.strip() for word in tasks for name in word.split(",") if name.strip()]
    for name in names:
        if name != VALIDATION and name not in CHOICE_TASKS:
            known = [VALIDATION, *CHOICE_TASKS]
            raise ValueError(f"there is no task {name}{nearest(name, known)}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def judge_tasks(
    names: Sequence[str], folder: Path | None, opened: OpenedModel, other: OpenedModel | None, precision: str
) -> list[Accuracy]:
    """The accuracies of each task, in the order of `names`; beside another model if one is given."""
    from overnight.evaluation.files import find_file
    from overnight.evaluation.multiple_choice import sum_up
    from overnight.evaluation.questions import CHOICE_TASKS, encode_question, read_questions

    paths = {name: find_file(CHOICE_TASKS[name].file, CHOICE_TASKS[name].url, folder) for name in names}
    found = []
    for name, path in paths.items():
        task = CHOICE_TASKS[name]
        questions = list(read_questions(task, path))
        if not questions:
            raise ValueError(f"{path} holds no question")
        sides = []
        for model in filter(None, (opened, other)):
            choices = [encode_question(question, model.tokenizer) for question in questions]
            sides.append(_judge(name, model.model, choices, precision))
        found += sum_up(name, sides[0], task.chance, sides[1] if other else None)
    return found


def _judge(name: str, model: GPT, choices: Sequence[Choice], precision: str) -> list[Judged]:
    """Every question judged, in the order of `choices`, with a bar."""
    from overnight.evaluation.choices import judge_choices

    places = {id(choice): place for place, choice in enumerate(choices)}
    found: dict[int, Judged] = {}
    with progress(name, len(choices), "questions") as advance:
        for judged in judge_choices(model, choices, precision):
            found[places[id(judged.choice)]] = judged
            advance()
    return [found[place] for place in range(len(choices))]


def describe(accuracies: Sequence[Accuracy]) -> Iterator[str]:
    """The lines of a table of at most 80 columns."""
    task = None
    for each in accuracies:
        if each.task != task:
            task = each.task
            yield f"{task}: {each.questions:,} questions, chance {each.chance:.2f}"
        interval = f"{each.interval.low:.4f} to {each.interval.high:.4f}"
        yield f"  {each.metric:<23}{each.value:.4f}   95% {interval} ({each.interval.method})"
        for reference in each.references:
            yield f"  {'':<23}{reference.value:.4f}   {reference.whose} ({reference.source})"
        if each.against is not None:
            rival = each.against
            yield (
                f"  {'':<23}{rival.right / each.questions:.4f}   the other model; alone right "
                f"{rival.only_here:,} here, {rival.only_there:,} there, p = {rival.probability:.3g} (McNemar)"
            )


def as_values(accuracies: Sequence[Accuracy]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [{**dataclasses.asdict(each), "value": each.value} for each in accuracies]
