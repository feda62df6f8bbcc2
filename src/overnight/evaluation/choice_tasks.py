"""Tasks of questions: how each record of the official files becomes a context and its endings.

Contexts and endings are formatted as lm-evaluation-harness formats them without examples, so that results
can be compared; but `hellaswag` is formatted as in build-nanogpt, and the harness's format is a task of its
own. The Children's Book Test follows section 3.2 of the GPT-2 paper: each candidate, and the rest of its
sentence. LAMBADA's passages have one ending, the last word, which greedy decoding has to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from overnight.data.text_files import BYTE_ORDER_MARK
from overnight.evaluation.multiple_choice import ACCURACIES, Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.text_tasks import join_treebank
from overnight.tokenizer.tokenizer import Tokenizer


class Question(NamedTuple):
    """A context, its endings, each with the space before it, and the index of the correct one."""

    context: str
    endings: tuple[str, ...]
    answer: int
    leads: tuple[str, ...] = ()
    """Text between the context and each ending, which is not scored; () if there is none."""


@dataclass(frozen=True)
class ChoiceTask:
    """A task: the source of its file, and how a record of the file is read."""

    name: str
    url: str
    file: str
    read: Callable[[Any], Question]
    """Reads a record."""
    endings: int | None
    """Number of endings of each question; None if it varies."""
    chance: float | None
    """The accuracy of guessing."""
    metrics: tuple[str, ...] = ACCURACIES
    records: Literal["json", "lines", "blocks"] = "json"
    """A record is the JSON of a line, a line, or the lines between two empty ones."""

    @property
    def kind(self) -> str:
        """What its examples are called."""
        return "passage" if self.endings == 1 else "question"


def _hellaswag(line: Mapping[str, Any]) -> Question:
    return Question(line["ctx"], tuple(f" {ending}" for ending in line["endings"]), int(line["label"]))


def _hellaswag_lm_eval(line: Mapping[str, Any]) -> Question:
    """The activity's name first, hints in brackets removed, spaces cleaned."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    endings = tuple(f" {clean(ending)}" for ending in line["endings"])
    context = f"{line['ctx_a']} {line['ctx_b'].capitalize()}" if "ctx_a" in line else line["ctx"]
    return Question(clean(f"{line['activity_label']}: {context}"), endings, int(line["label"]))


def _openbookqa(line: Mapping[str, Any]) -> Question:
    choices = line["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    endings = tuple(f" {choice['text']}" for choice in choices)
    return Question(line["question"]["stem"], endings, labels.index(line["answerKey"]))


def _arc(line: Mapping[str, Any]) -> Question:
    question = _openbookqa(line)
    return question._replace(context=f"Question: {question.context}\nAnswer:")


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
    """Only the words after the name are scored; they are the same for both names."""
    before, gap, after = (part.strip() for part in line["sentence"].partition("_"))
    if not gap:
        raise ValueError("the sentence has no gap")
    leads = (f" {line['option1']}", f" {line['option2']}")
    return Question(before, (f" {after}",) * 2, int(line["answer"]) - 1, leads)


def _book_test(block: list[bytes]) -> Question:
    """Twenty sentences, and a sentence with a gap for the candidates."""
    *sentences, last = (re.sub(r"^\d+ ", "", line.decode().rstrip("\r\n")) for line in block)
    query, answer, _, candidates = last.split("\t")
    before, after = join_treebank(query).split("XXXXX")
    space = "" if before and before == before.rstrip() else " "
    words = candidates.split("|")
    endings = tuple(f"{space}{word}{after}" for word in words)
    context = " ".join([*map(join_treebank, sentences), before]).rstrip()
    return Question(context, endings, words.index(answer))


def _last_word(text: str) -> Question:
    context, _, word = text.strip().rpartition(" ")
    return Question(context, (f" {word}",), 0)


def _lambada(line: Mapping[str, Any]) -> Question:
    return _last_word(line["text"])


def _lambada_plain(line: bytes) -> Question:
    return _last_word(line.decode())


ALLEN = "https://ai2-public-datasets.s3.amazonaws.com"
ARC = f"{ALLEN}/arc/ARC-V1-Feb2018.zip"
OPENBOOKQA = f"{ALLEN}/open-book-qa/OpenBookQA-V1-Sep2018.zip"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PIQA = "https://yonatanbisk.com/piqa/data/valid.jsonl"
SUPER_GLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
WINOGRANDE = "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip"
BOOK_TEST = "http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz"
COMMON_NOUNS = "CBTest/data/cbtest_CN_test_2500ex.txt"
NAMED_ENTITIES = "CBTest/data/cbtest_NE_test_2500ex.txt"
OPENAI_LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
PLAIN_LAMBADA = "https://zenodo.org/record/2630551/files/lambada-dataset.tar.gz"
PLAIN_FILE = "lambada_test_plain_text.txt"
BY_SUM = ("accuracy_by_sum",)
GREEDY = ("accuracy",)
CLEANED = ("accuracy_per_character", "accuracy_by_sum")

ROWS = (
    # The right continuation of a description (Zellers et al. 2019); the same in lm-eval's format.
    ChoiceTask("hellaswag", HELLASWAG, "hellaswag_val.jsonl", _hellaswag, 4, 0.25),
    ChoiceTask("hellaswag-lm-eval", HELLASWAG, "hellaswag_val.jsonl", _hellaswag_lm_eval, 4, 0.25, CLEANED),
    # Questions of school science; word statistics do not answer the challenging ones (Clark et al. 2018).
    ChoiceTask("arc-easy", ARC, "ARC-Easy-Test.jsonl", _arc, None, 0.25),
    ChoiceTask("arc-challenge", ARC, "ARC-Challenge-Test.jsonl", _arc, None, 0.25),
    # Questions that need a fact and common sense (Mihaylov et al. 2018).
    ChoiceTask("openbookqa", OPENBOOKQA, "openbookqa-test.jsonl", _openbookqa, 4, 0.25),
    # Two ways to reach a goal in everyday physics (Bisk et al. 2020).
    ChoiceTask("piqa", PIQA, "piqa_valid.jsonl", _piqa, 2, 0.5),
    # A yes-or-no question about a passage (Clark et al. 2019).
    ChoiceTask("boolq", f"{SUPER_GLUE}/BoolQ.zip", "boolq_val.jsonl", _boolq, 2, 0.5),
    # The more plausible cause or effect (Roemmele et al. 2011).
    ChoiceTask("copa", f"{SUPER_GLUE}/COPA.zip", "copa_val.jsonl", _copa, 2, 0.5),
    # Whom a sentence refers to (Sakaguchi et al. 2019).
    ChoiceTask("winogrande", WINOGRANDE, "winogrande_1.1/dev.jsonl", _winogrande, 2, 0.5, BY_SUM),
    # The missing noun or name in a story (Hill et al. 2015).
    ChoiceTask("cbt-common-nouns", BOOK_TEST, COMMON_NOUNS, _book_test, 10, 0.1, BY_SUM, "blocks"),
    ChoiceTask("cbt-named-entities", BOOK_TEST, NAMED_ENTITIES, _book_test, 10, 0.1, BY_SUM, "blocks"),
    # Paperno et al. 2016: as prepared by OpenAI, and as published (lower case, punctuation split off).
    ChoiceTask("lambada", OPENAI_LAMBADA, "lambada_test.jsonl", _lambada, 1, None, GREEDY),
    ChoiceTask("lambada-plain", PLAIN_LAMBADA, PLAIN_FILE, _lambada_plain, 1, None, GREEDY, "lines"),
)
CHOICE_TASKS = {task.name: task for task in ROWS}


def read_questions(task: ChoiceTask, path: Path) -> Iterator[Question]:
    """Every question of a task's file. Raises ValueError, naming the line, for an invalid one."""
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        records: Iterable[tuple[int, Any]] = (
            _read_blocks(file) if task.records == "blocks" else enumerate(file, start=1)
        )
        for number, record in records:
            try:
                question = task.read(json.loads(record) if task.records == "json" else record)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{path}, line {number} is not a {task.kind} of {task.name}: download the file again"
                ) from None
            _check(question, task, f"{path}, line {number}")
            yield question


def _read_blocks(file: Iterable[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """The number of each block's first line, and its lines; blocks are separated by empty lines."""
    lines = iter(file)
    number = 1
    while block := list(takewhile(lambda line: line.strip(), lines)):
        yield number, block
        number += len(block) + 1


def _check(question: Question, task: ChoiceTask, where: str) -> None:
    count = len(question.endings)
    if not isinstance(question.context, str):
        raise ValueError(f"{where}: its context {question.context!r} is not text")
    if task.endings == 1 and not question.context.strip():
        raise ValueError(f"{where}: {question.endings[0][1:41]!r} has no word before its last word")
    if task.endings not in {None, count} or (task.endings is None and count < 2):
        raise ValueError(f"{where} has {count} endings, but {task.name} has {task.endings or 'at least 2'}")
    if not 0 <= question.answer < count:
        raise ValueError(f"{where}: the answer {question.answer} is not between 0 and {count - 1}")


def encode_question(question: Question, tokenizer: Tokenizer, context_length: int) -> Choice | Passage:
    """A question as ids, the context and each ending encoded separately, as in build-nanogpt and lm-eval.

    An empty context becomes the end-of-text id. With one ending it is a passage, and the first ids of one
    that is too long are dropped. Raises ValueError for such an ending without room for an id before it.
    """
    context = tokenizer.encode(question.context) or [tokenizer.end_of_text]
    endings = tuple(tuple(tokenizer.encode(ending)) for ending in question.endings)
    if len(endings) == 1:
        (word,) = endings
        if len(word) > context_length:
            text = question.endings[0][:40]
            raise ValueError(f"the word {text!r} does not fit the model's context of {context_length}")
        return Passage([*context[-(context_length + 1 - len(word)) :], *word], len(word))
    return Choice(
        tuple(context),
        endings,
        tuple(len(ending.removeprefix(" ")) for ending in question.endings),
        question.answer,
        tuple(tuple(tokenizer.encode(lead)) for lead in question.leads),
    )
