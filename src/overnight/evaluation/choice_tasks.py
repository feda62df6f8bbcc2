"""Multiple-choice tasks: how each record of the official files becomes a context and its endings.

A task is data: what follows is a table of small functions. Contexts and endings are put as
lm-evaluation-harness puts them without examples, so that results can be compared; but hellaswag is put as
build-nanogpt puts it, and the harness's way is a task of its own. The Children's Book Test is put as the
GPT-2 paper says (section 3.2): each candidate, and all that follows it in its sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.text_tasks import join_treebank
from overnight.tokenizer.tokenizer import Tokenizer


class Question(NamedTuple):
    """A context, its endings, each with the blank it begins with, and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    answer: int
    leads: tuple[str, ...] = ()
    """Of each ending what stands between the context and it, and is not judged; () where nothing does."""


@dataclass(frozen=True)
class ChoiceTask:
    """One task: where its file comes from, and how a record of it is read."""

    name: str
    about: str
    url: str
    file: str
    read: Callable[[Any], Question]
    """Of a line's JSON; of the Children's Book Test, of a block of lines."""
    endings: int | None
    """Of each question; None where they vary."""
    chance: float
    """The accuracy of guessing."""
    metrics: tuple[str, ...] = ("accuracy_per_token", "accuracy_per_character", "accuracy_by_sum")


def _hellaswag(line: Mapping[str, Any]) -> Question:
    return Question(line["ctx"], tuple(f" {ending}" for ending in line["endings"]), int(line["label"]))


def _hellaswag_of_harness(line: Mapping[str, Any]) -> Question:
    """The activity's name first, bracketed hints left out, blanks mended."""

    def mend(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    endings = tuple(f" {mend(ending)}" for ending in line["endings"])
    context = f"{line['ctx_a']} {line['ctx_b'].capitalize()}" if "ctx_a" in line else line["ctx"]
    return Question(mend(f"{line['activity_label']}: {context}"), endings, int(line["label"]))


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


def _winogrande(line: Mapping[str, Any]) -> Question:
    """Only what follows the name is judged: the same words after either."""
    before, gap, after = (part.strip() for part in line["sentence"].partition("_"))
    if not gap:
        raise ValueError("the sentence has no gap")
    leads = (f" {line['option1']}", f" {line['option2']}")
    return Question(before, (f" {after}",) * 2, int(line["answer"]) - 1, leads)


def _book_test(block: list[str]) -> Question:
    """Twenty sentences, and a sentence with a gap; the candidates fill it."""
    *sentences, last = (re.sub(r"^\d+ ", "", line) for line in block)
    query, answer, _, candidates = last.split("\t")
    before, after = join_treebank(query).split("XXXXX")
    blank = "" if before and before == before.rstrip() else " "
    words = candidates.split("|")
    endings = tuple(f"{blank}{word}{after}" for word in words)
    context = " ".join([*map(join_treebank, sentences), before]).rstrip()
    return Question(context, endings, words.index(answer))


ALLEN = "https://ai2-public-datasets.s3.amazonaws.com"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
BOOK_TEST = "http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz"
SUPER_GLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
CHOICE_TASKS = {
    task.name: task
    for task in (
        ChoiceTask(
            "hellaswag",
            "the right end of a description, of four (Zellers et al. 2019)",
            HELLASWAG,
            "hellaswag_val.jsonl",
            _hellaswag,
            4,
            0.25,
        ),
        ChoiceTask(
            "hellaswag-lm-eval",
            "the same questions as lm-evaluation-harness puts them",
            HELLASWAG,
            "hellaswag_val.jsonl",
            _hellaswag_of_harness,
            4,
            0.25,
            ("accuracy_per_character", "accuracy_by_sum"),
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
        ChoiceTask(
            "winogrande",
            "whom a sentence speaks of, of two (Sakaguchi et al. 2019)",
            "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
            "winogrande_1.1/dev.jsonl",
            _winogrande,
            2,
            0.5,
            ("accuracy_by_sum",),
        ),
        ChoiceTask(
            "cbt-common-nouns",
            "the noun that is missing in a story, of ten (Hill et al. 2015)",
            BOOK_TEST,
            "CBTest/data/cbtest_CN_test_2500ex.txt",
            _book_test,
            10,
            0.1,
            ("accuracy_by_sum",),
        ),
        ChoiceTask(
            "cbt-named-entities",
            "the name that is missing in a story, of ten",
            BOOK_TEST,
            "CBTest/data/cbtest_NE_test_2500ex.txt",
            _book_test,
            10,
            0.1,
            ("accuracy_by_sum",),
        ),
    )
}


def read_questions(task: ChoiceTask, path: Path) -> Iterator[Question]:
    """Every question of a task's file. Raises ValueError, naming the line, for one that is not sound."""
    records = _read_blocks if task.read is _book_test else _read_lines
    with path.open("rb") as file:
        for number, record in records(file):
            try:
                question = task.read(record())
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}, line {number} is no question of {task.name}: fetch the file again"
                ) from None
            _check(question, task, f"{path}, line {number}")
            yield question


def _read_lines(file: Iterable[bytes]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The number of each line, and what reads it."""
    for number, line in enumerate(file, start=1):
        yield number, partial(json.loads, line)


def _read_blocks(file: Iterable[bytes]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The number of the first line of each block, and what reads the block; blank lines part blocks."""
    lines = iter(file)
    number = 1
    while block := list(takewhile(lambda line: line.strip(), lines)):
        yield number, partial(_decode, block)
        number += len(block) + 1


def _decode(lines: Sequence[bytes]) -> list[str]:
    return [line.decode().rstrip("\r\n") for line in lines]


def _check(question: Question, task: ChoiceTask, where: str) -> None:
    count = len(question.endings)
    if not isinstance(question.context, str):
        raise ValueError(f"{where}: its context {question.context!r} is no text")
    if task.endings not in {None, count} or count < 2:
        raise ValueError(f"{where} has {count} endings, and {task.name} has {task.endings or 'more'}")
    if not 0 <= question.answer < count:
        raise ValueError(
            f"{where}: the answer is number {question.answer}, and there are {count} endings, from 0 on"
        )


def encode_question(question: Question, tokenizer: Tokenizer) -> Choice:
    """A question as ids: the context and each ending by itself, as build-nanogpt and lm-eval divide them.

    Before what has no context stands the id that begins a document.
    """
    return Choice(
        tuple(tokenizer.encode(question.context)) or (tokenizer.end_of_text,),
        tuple(tuple(tokenizer.encode(ending)) for ending in question.endings),
        tuple(len(ending.removeprefix(" ")) for ending in question.endings),
        question.answer,
        tuple(tuple(tokenizer.encode(lead)) for lead in question.leads),
    )
