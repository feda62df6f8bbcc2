"""Multiple-choice tasks: how a line of each official file becomes a context and its endings.

A task is data: what follows is a table of small functions. Contexts and endings are put as
lm-evaluation-harness puts them without examples, so that results can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from overnight.evaluation.choices import Choice
from overnight.text.tokenizer import Tokenizer


class Question(NamedTuple):
    """A context, its endings, each with the blank it begins with, and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceTask:
    """One task: where its file comes from, and how a line of it is read."""

    name: str
    about: str
    url: str
    file: str
    read: Callable[[Mapping[str, Any]], Question]
    endings: int | None
    """Of each question; None where they vary."""
    chance: float
    """The accuracy of guessing."""


def _hellaswag(line: Mapping[str, Any]) -> Question:
    return Question(line["ctx"], tuple(f" {ending}" for ending in line["endings"]), int(line["label"]))


def _arc(line: Mapping[str, Any]) -> Question:
    choices = line["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    endings = tuple(f" {choice['text']}" for choice in choices)
    return Question(
        f"Question: {line['question']['stem']}\nAnswer:", endings, labels.index(line["answerKey"])
    )


def _openbookqa(line: Mapping[str, Any]) -> Question:
    choices = line["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    endings = tuple(f" {choice['text']}" for choice in choices)
    return Question(line["question"]["stem"], endings, labels.index(line["answerKey"]))


def _piqa(line: Mapping[str, Any]) -> Question:
    endings = (f" {line['sol1']}", f" {line['sol2']}")
    return Question(f"Question: {line['goal']}\nAnswer:", endings, int(line["label"]))


def _boolq(line: Mapping[str, Any]) -> Question:
    context = f"{line['passage']}\nQuestion: {line['question']}?\nAnswer:"
    return Question(context, (" no", " yes"), int(bool(line["label"])))


def _copa(line: Mapping[str, Any]) -> Question:
    joining = {"cause": "because", "effect": "therefore"}[line["question"]]
    context = f"{line['premise'].strip().removesuffix('.')} {joining}"
    endings = tuple(f" {text[0].lower()}{text[1:]}" for text in (line["choice1"], line["choice2"]))
    return Question(context, endings, int(line["label"]))


ALLEN = "https://ai2-public-datasets.s3.amazonaws.com"
SUPER_GLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
CHOICE_TASKS = {
    task.name: task
    for task in (
        ChoiceTask(
            "hellaswag",
            "the right end of a description, of four (Zellers et al. 2019)",
            "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
            "hellaswag_val.jsonl",
            _hellaswag,
            4,
            0.25,
        ),
        ChoiceTask(
            "arc-easy",
            "questions of school science, easy ones (Clark et al. 2018)",
            f"{ALLEN}/arc/ARC-V1-Feb2018.zip",
            "ARC-Easy-Test.jsonl",
            _arc,
            None,
            0.25,
        ),
        ChoiceTask(
            "arc-challenge",
            "questions of school science that are not found by words alone (Clark et al. 2018)",
            f"{ALLEN}/arc/ARC-V1-Feb2018.zip",
            "ARC-Challenge-Test.jsonl",
            _arc,
            None,
            0.25,
        ),
        ChoiceTask(
            "openbookqa",
            "questions that take a fact and common sense (Mihaylov et al. 2018)",
            f"{ALLEN}/open-book-qa/OpenBookQA-V1-Sep2018.zip",
            "openbookqa-test.jsonl",
            _openbookqa,
            4,
            0.25,
        ),
        ChoiceTask(
            "piqa",
            "how to do something with things at hand, of two ways (Bisk et al. 2020)",
            "https://yonatanbisk.com/piqa/data/valid.jsonl",
            "piqa_valid.jsonl",
            _piqa,
            2,
            0.5,
        ),
        ChoiceTask(
            "boolq",
            "a question about a passage, yes or no (Clark et al. 2019)",
            f"{SUPER_GLUE}/BoolQ.zip",
            "boolq_val.jsonl",
            _boolq,
            2,
            0.5,
        ),
        ChoiceTask(
            "copa",
            "the likelier cause or effect, of two (Roemmele et al. 2011)",
            f"{SUPER_GLUE}/COPA.zip",
            "copa_val.jsonl",
            _copa,
            2,
            0.5,
        ),
    )
}


def read_questions(task: ChoiceTask, path: Path) -> Iterator[Question]:
    """Every question of a task's file. Raises ValueError, naming the line, for one that is not sound."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                question = task.read(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}, line {number} is no question of {task.name}: fetch the file again"
                ) from None
            if not isinstance(question.context, str):
                raise ValueError(f"{path}, line {number}: its context {question.context!r} is no text")
            count = len(question.endings)
            if task.endings not in {None, count} or count < 2:
                raise ValueError(
                    f"{path}, line {number} has {count} endings, and {task.name} has {task.endings}"
                )
            if not 0 <= question.answer < count:
                raise ValueError(
                    f"{path}, line {number}: the answer is number {question.answer}, and there are {count} "
                    "endings, from 0 on"
                )
            yield question


def encode_question(question: Question, tokenizer: Tokenizer) -> Choice:
    """A question as ids: the context and each ending by itself, as build-nanogpt and lm-eval divide them."""
    return Choice(
        tuple(tokenizer.encode(question.context)),
        tuple(tuple(tokenizer.encode(ending)) for ending in question.endings),
        tuple(len(ending.removeprefix(" ")) for ending in question.endings),
        question.answer,
    )
