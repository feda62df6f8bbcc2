"""Texts that a model is judged on as a whole, and LAMBADA's passages, of which only the last word counts.

They are the zero-shot table of the GPT-2 paper (table 3), without the One Billion Word Benchmark.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from overnight.evaluation.passages import Passage, cut_windows
from overnight.evaluation.perplexity import Unit
from overnight.tokenizer.tokenizer import Tokenizer

TEST_BYTES = 5_000_000  # of enwik8 and text8: by custom the last twentieth is what is judged


class EvaluationText(NamedTuple):
    """One text, as a model reads it."""

    text: str
    words: int | None
    """As its publishers count them; None where results are not told by the word."""

    def units(self) -> dict[Unit, float]:
        """How much of it there is."""
        found: dict[Unit, float] = {"byte": len(self.text.encode()), "character": len(self.text)}
        return found if self.words is None else {**found, "word": self.words}


class Cloze(NamedTuple):
    """A passage without its last word, and that word with the blank before it."""

    context: str
    word: str


@dataclass(frozen=True)
class TextTask:
    """A text that is judged from beginning to end."""

    name: str
    about: str
    url: str
    file: str
    read: Callable[[Path, int | None], EvaluationText]
    """(file, how many characters of it at most) -> its text."""
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class ClozeTask:
    """Passages whose last word is judged."""

    name: str
    about: str
    url: str
    file: str
    read: Callable[[Path], list[Cloze]]


def _read_wikitext(path: Path, most: int | None) -> EvaluationText:
    text = _utf8(path)[:most]
    return EvaluationText(join_wikitext(text), _count_words(text))


def _read_treebank(path: Path, most: int | None) -> EvaluationText:
    text = _utf8(path)[:most]
    return EvaluationText(join_treebank(text), _count_words(text))


def _read_wikipedia(path: Path, most: int | None) -> EvaluationText:
    data = path.read_bytes()[-TEST_BYTES:]
    text = data.decode(errors="ignore")  # it is cut anywhere, inside a character perhaps
    return EvaluationText(text[:most], None)


def _read_lambada(path: Path) -> list[Cloze]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"{path}, line {number} is no passage of lambada: fetch the file again"
            ) from None
        found.append(_cut_last_word(text, path, number))
    return found


def _read_plain_lambada(path: Path) -> list[Cloze]:
    lines = _utf8(path).splitlines()
    return [_cut_last_word(line, path, number) for number, line in enumerate(lines, start=1)]


def _cut_last_word(text: object, path: Path, number: int) -> Cloze:
    if not isinstance(text, str) or not (parts := text.strip().rpartition(" "))[0].strip():
        raise ValueError(f"{path}, line {number}: {str(text)[:40]!r} has no word before its last one")
    return Cloze(parts[0], f" {parts[2]}")


def _count_words(text: str) -> int:
    """As the publishers count: words between blanks, and a line's end is one."""
    return len(text.split()) + text.count("\n")


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text at byte {error.start}: fetch the file again") from None


WIKITEXT = "https://wikitext.smerity.com"
OPENAI_LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
PLAIN_LAMBADA = "https://zenodo.org/record/2630551/files/lambada-dataset.tar.gz"
PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
PER_WORD = ("perplexity_per_word", "nats_per_token", "bits_per_byte")

TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask(
            "wikitext-2",
            "articles of Wikipedia, the test split (Merity et al. 2016)",
            f"{WIKITEXT}/wikitext-2-v1.zip",
            "wikitext-2/wiki.test.tokens",
            _read_wikitext,
            PER_WORD,
        ),
        TextTask(
            "wikitext-2-validation",
            "its validation split",
            f"{WIKITEXT}/wikitext-2-v1.zip",
            "wikitext-2/wiki.valid.tokens",
            _read_wikitext,
            PER_WORD,
        ),
        TextTask(
            "wikitext-103",
            "the same test articles, fewer words of them replaced by <unk>",
            f"{WIKITEXT}/wikitext-103-v1.zip",
            "wikitext-103/wiki.test.tokens",
            _read_wikitext,
            PER_WORD,
        ),
        TextTask(
            "ptb",
            "the Wall Street Journal, as prepared by Mikolov, the test split",
            PTB,
            "simple-examples/data/ptb.test.txt",
            _read_treebank,
            PER_WORD,
        ),
        TextTask(
            "enwik8",
            "the markup of Wikipedia, the last 5 MB of a hundred",
            "http://mattmahoney.net/dc/enwik8.zip",
            "enwik8",
            _read_wikipedia,
            ("bits_per_byte", "nats_per_token"),
        ),
        TextTask(
            "text8",
            "Wikipedia as lower-case words, the last 5 MB of a hundred",
            "http://mattmahoney.net/dc/text8.zip",
            "text8",
            _read_wikipedia,
            ("bits_per_character", "nats_per_token"),
        ),
    )
}

CLOZE_TASKS = {
    task.name: task
    for task in (
        ClozeTask(
            "lambada",
            "the last word of a passage, as OpenAI prepared them (Paperno et al. 2016)",
            OPENAI_LAMBADA,
            "lambada_test.jsonl",
            _read_lambada,
        ),
        ClozeTask(
            "lambada-plain",
            "the same as published: words in lower case, cut from their punctuation",
            PLAIN_LAMBADA,
            "lambada_test_plain_text.txt",
            _read_plain_lambada,
        ),
    )
}


def encode_text(
    text: str, tokenizer: Tokenizer, context_length: int, stride: int | None = None
) -> list[Passage]:
    """A text as windows, each of its ids judged once; the first after the id that begins a document."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    return list(cut_windows(ids, context_length, stride))


def encode_cloze(cloze: Cloze, tokenizer: Tokenizer, context_length: int) -> Passage:
    """A passage, its last word judged; the first ids of one that is too long are left out.

    Raises ValueError for a word that leaves no room for anything before it.
    """
    word = tokenizer.encode(cloze.word)
    if len(word) > context_length:
        raise ValueError(f"the word {cloze.word[:40]!r} does not fit the model's context of {context_length}")
    context = tokenizer.encode(cloze.context)[-(context_length + 1 - len(word)) :]
    return Passage([*context, *word], len(word))


# ---------------------------------------------------------------- text that was cut into words for older models, put together again as people write it


_TO_THE_LEFT = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|m|d|re|ve|ll)\b|n't\b|\.\.\.)(?=\s|$|[,.;:!?)\]}'\"])")
_TO_THE_RIGHT = re.compile(r"(?<!\S)([(\[{$£#]) (?=\S)")
_JOINED = re.compile(r" @([-,.])@ ")
_SLASH = re.compile(r"(?<=\S) / (?=\S)")
_QUOTE = re.compile(r'(?<!\S)"(?!\S)')
_POSSESSIVE = re.compile(r"(?<=s) '(?= )")
_SINGLE = re.compile(r"(?<!\S)' (\S.*?) '(?!\S)")
_HEADING = re.compile(r"^ (=(?: =)*) (.*?) (=(?: =)*) $", re.MULTILINE)
_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_BRACKET = re.compile("|".join(_BRACKETS), re.IGNORECASE)


def join_words(text: str) -> str:
    """Punctuation back at its words, quotation marks around what they enclose, line by line."""
    return "\n".join(_join_line(line) for line in text.split("\n"))


def join_wikitext(text: str) -> str:
    """WikiText's: also headings, numbers, words with hyphens, and no blanks around lines."""
    text = _HEADING.sub(_heading, text)
    text = _JOINED.sub(r"\1", text)
    return "\n".join(_join_line(line.strip(" ")) for line in text.split("\n"))


def join_treebank(text: str) -> str:
    """The Penn Treebank's: also its brackets, its quotation marks, and cut contractions."""
    text = _BRACKET.sub(lambda found: _BRACKETS[found[0].lower()], text)
    text = text.replace("``", "\x00").replace("''", "\x01")
    return "\n".join(_join_line(line.strip(" ")) for line in text.split("\n"))


def _heading(found: re.Match[str]) -> str:
    before, title, after = found.groups()
    return f"{before.replace(' ', '')} {title} {after.replace(' ', '')}"


def _join_line(line: str) -> str:
    turn = itertools.cycle(("\x00", "\x01"))  # opens, closes
    line = _QUOTE.sub(lambda _: next(turn), line)
    line = line.replace("\x00 ", '"').replace(" \x01", '"').replace("\x00", '"').replace("\x01", '"')
    line = _SINGLE.sub(r"'\1'", _POSSESSIVE.sub("'", line))
    line = _TO_THE_LEFT.sub(r"\1", line)
    line = _TO_THE_RIGHT.sub(r"\1", line)
    return _SLASH.sub("/", line)
