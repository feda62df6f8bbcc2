"""Every task by its name, opened the same way: questions, passages or a text, ready for any model.

What a model makes of an example is a few numbers, so that it can be written down and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from overnight.evaluation.choices import Choice, Judged, judge_choices
from overnight.evaluation.files import find_file
from overnight.evaluation.measured import Measured
from overnight.evaluation.passages import Passage, Scored, judge_passages
from overnight.evaluation.questions import CHOICE_TASKS, encode_question, read_questions
from overnight.evaluation.scores import Score, score_choices, score_passages, score_text
from overnight.evaluation.texts import CLOZE_TASKS, TEXT_TASKS, Text, encode_cloze, encode_text
from overnight.model.gpt import GPT
from overnight.text.tokenizer import Tokenizer
from overnight.world import ALONE, World

Example = Choice | Passage
Numbers = tuple[float, ...]
"""What a model makes of an example: the nats of each ending; or a passage's nats, and 1 if it is greedy."""
Item = TypeVar("Item")
CHARACTERS = 1000  # of a text, that count as an example where only some are asked for

TASKS: tuple[str, ...] = (*CHOICE_TASKS, *CLOZE_TASKS, *TEXT_TASKS)


@dataclass(frozen=True)
class Judgement:
    """What one model makes of all examples of a task, in their order."""

    examples: Sequence[Example]
    numbers: Sequence[Numbers]


@dataclass(frozen=True)
class Task:
    """A task whose file has been read."""

    name: str
    encode: Callable[[Tokenizer, int], Sequence[Example]]
    """(tokenizer, context length) -> its examples as ids. Raises ValueError for one that can't be read so."""
    score: Callable[[Judgement, Judgement | None], list[Score]]
    """A model's results, beside another model's if there is one."""


def open_task(name: str, folder: Path | None, most: int | None = None, stride: int | None = None) -> Task:
    """One of TASKS, its file found in `folder` or fetched; with `most`, the first so many examples of it.

    Of a text that is the first so many thousand characters. `stride` is for texts, too: how many new ids a
    window judges. Raises ValueError for a file that is not there,
    damaged, or empty.
    """
    if name in CHOICE_TASKS:
        choice_task = CHOICE_TASKS[name]
        path = find_file(choice_task.file, choice_task.url, folder)
        questions = _at_most(most, list(read_questions(choice_task, path)), path)
        return Task(
            name,
            lambda tokenizer, _: [encode_question(question, tokenizer) for question in questions],
            partial(_score_choices, name),
        )
    if name in CLOZE_TASKS:
        cloze_task = CLOZE_TASKS[name]
        path = find_file(cloze_task.file, cloze_task.url, folder)
        clozes = _at_most(most, cloze_task.read(path), path)
        return Task(
            name,
            lambda tokenizer, length: [encode_cloze(cloze, tokenizer, length) for cloze in clozes],
            partial(_score_clozes, name),
        )
    text_task = TEXT_TASKS[name]
    path = find_file(text_task.file, text_task.url, folder)
    text = text_task.read(path, None if most is None else most * CHARACTERS)
    if not text.text.strip():
        raise ValueError(f"{path} is empty: fetch it again")
    return Task(
        name,
        lambda tokenizer, length: encode_text(text.text, tokenizer, length, stride),
        partial(_score_text, name, text),
    )


def judge(
    model: GPT, examples: Sequence[Example], precision: str, world: World = ALONE
) -> Iterator[tuple[int, Numbers]]:
    """The place of each of a task's examples, and what the model makes of it, in any order.

    The examples are divided among the processes of `world`, each of which yields its own.
    """
    choices = [example for example in examples if isinstance(example, Choice)]
    passages = [example for example in examples if isinstance(example, Passage)]
    assert not choices or not passages
    for place, judged in judge_choices(model, choices, precision, world):
        yield place, judged.nats
    for place, scored in judge_passages(model, passages, precision, world):
        yield place, (scored.nats, float(scored.is_greedy))


def _at_most(most: int | None, items: list[Item], path: Path) -> list[Item]:
    if not items:
        raise ValueError(f"{path} is empty: fetch it again")
    return items[:most]


def _score_choices(name: str, here: Judgement, there: Judgement | None) -> list[Score]:
    task = CHOICE_TASKS[name]
    against = None if there is None else _as_judged(there)
    return score_choices(name, _as_judged(here), task.chance, against, task.metrics)


def _score_clozes(name: str, here: Judgement, there: Judgement | None) -> list[Score]:
    against = None if there is None else (_as_scored(there), _measure_words(there))
    return score_passages(name, _as_scored(here), _measure_words(here), against)


def _score_text(name: str, text: Text, here: Judgement, there: Judgement | None) -> list[Score]:
    against = None if there is None else _measure_text(text, there)
    return score_text(name, TEXT_TASKS[name].metrics, _measure_text(text, here), against)


def _as_judged(side: Judgement) -> list[Judged]:
    pairs = zip(side.numbers, side.examples, strict=True)
    return [Judged(nats, choice) for nats, choice in pairs if isinstance(choice, Choice)]


def _as_scored(side: Judgement) -> list[Scored]:
    return [Scored(nats, bool(is_greedy)) for nats, is_greedy in side.numbers]


def _measure_words(side: Judgement) -> Measured:
    """Each passage's last word is one word, however many ids it has."""
    nats = tuple(numbers[0] for numbers in side.numbers)
    return Measured(nats=nats, tokens=(1,) * len(nats), units={"word": len(nats)})


def _measure_text(text: Text, side: Judgement) -> Measured:
    tokens = tuple(passage.scored for passage in side.examples if isinstance(passage, Passage))
    return Measured(nats=tuple(numbers[0] for numbers in side.numbers), tokens=tokens, units=text.units())
