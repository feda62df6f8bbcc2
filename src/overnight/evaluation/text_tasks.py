"""Texts that are evaluated as a whole, and passages whose last word is predicted (LAMBADA).

They are the zero-shot tasks of the GPT-2 paper (table 3), without the One Billion Word Benchmark.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from overnight.evaluation.passages import Passage, cut_windows
from overnight.evaluation.perplexity import Unit
from overnight.tokenizer.tokenizer import Tokenizer

TEST_BYTES = 5_000_000  # of enwik8 and text8: by convention the last 5% are the test split


class EvaluationText(NamedTuple):
    """One text, as a model reads it."""

    text: str
    words: int | None
    """Number of words as the publishers count them; None if results are not reported per word."""

    def units(self) -> dict[Unit, float]:
        """Its bytes, characters and words."""
        found: dict[Unit, float] = {"byte": len(self.text.encode()), "character": len(self.text)}
        return found if self.words is None else {**found, "word": self.words}


class Cloze(NamedTuple):
    """A passage without its last word, and that word with the space before it."""

    context: str
    word: str


@dataclass(frozen=True)
class TextTask:
    """A text that is evaluated as a whole."""

    name: str
    url: str
    file: str
    format: Literal["wikitext", "treebank", "wikipedia"]
    metrics: tuple[str, ...]

    def read(self, path: Path, most: int | None) -> EvaluationText:
        """The text of the file, or its first `most` characters. Raises ValueError if it is not UTF-8."""
        if self.format == "wikipedia":
            data = path.read_bytes()[-TEST_BYTES:]
            return EvaluationText(data.decode(errors="ignore")[:most], None)  # the cut may split a character
        text = _utf8(path)[:most]
        words = len(text.split()) + text.count("\n")  # as the publishers count: the end of a line is a word
        join = join_wikitext if self.format == "wikitext" else join_treebank
        return EvaluationText(join(text), words)


@dataclass(frozen=True)
class ClozeTask:
    """Passages whose last word is predicted."""

    name: str
    url: str
    file: str
    is_json: bool
    """True for JSON lines, false for a passage on each line."""

    def read(self, path: Path) -> list[Cloze]:
        """Every passage of the file. Raises ValueError, naming the line, for an invalid one."""
        lines: list[Any] = path.read_bytes().splitlines() if self.is_json else _utf8(path).splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"] if self.is_json else line
                context, _, word = text.strip().rpartition(" ")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{path}, line {number} is not a passage of {self.name}: download the file again"
                ) from None
            if not context.strip():
                raise ValueError(f"{path}, line {number}: {text[:40]!r} has no word before its last word")
            found.append(Cloze(context, f" {word}"))
        return found


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: download the file again") from None


WIKITEXT_2 = "https://wikitext.smerity.com/wikitext-2-v1.zip"
WIKITEXT_103 = "https://wikitext.smerity.com/wikitext-103-v1.zip"
PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
ENWIK8 = "http://mattmahoney.net/dc/enwik8.zip"
TEXT8 = "http://mattmahoney.net/dc/text8.zip"
OPENAI_LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
PLAIN_LAMBADA = "https://zenodo.org/record/2630551/files/lambada-dataset.tar.gz"
PER_WORD = ("perplexity_per_word", "nats_per_token", "bits_per_byte")
PER_BYTE = ("bits_per_byte", "nats_per_token")
PER_CHARACTER = ("bits_per_character", "nats_per_token")

TEXT_ROWS = (
    # Articles of Wikipedia (Merity et al. 2016); in wikitext-103 fewer of the same words are <unk>.
    TextTask("wikitext-2", WIKITEXT_2, "wikitext-2/wiki.test.tokens", "wikitext", PER_WORD),
    TextTask("wikitext-2-validation", WIKITEXT_2, "wikitext-2/wiki.valid.tokens", "wikitext", PER_WORD),
    TextTask("wikitext-103", WIKITEXT_103, "wikitext-103/wiki.test.tokens", "wikitext", PER_WORD),
    # The Wall Street Journal, as prepared by Mikolov.
    TextTask("ptb", PTB, "simple-examples/data/ptb.test.txt", "treebank", PER_WORD),
    # 100 MB of Wikipedia: with its markup, and as lower-case words.
    TextTask("enwik8", ENWIK8, "enwik8", "wikipedia", PER_BYTE),
    TextTask("text8", TEXT8, "text8", "wikipedia", PER_CHARACTER),
)
TEXT_TASKS = {task.name: task for task in TEXT_ROWS}

CLOZE_ROWS = (
    # Paperno et al. 2016: as prepared by OpenAI, and as published (lower case, punctuation split off).
    ClozeTask("lambada", OPENAI_LAMBADA, "lambada_test.jsonl", True),
    ClozeTask("lambada-plain", PLAIN_LAMBADA, "lambada_test_plain_text.txt", False),
)
CLOZE_TASKS = {task.name: task for task in CLOZE_ROWS}


def encode_text(
    text: str, tokenizer: Tokenizer, context_length: int, stride: int | None = None
) -> list[Passage]:
    """A text as windows, each of its ids a target once; the first follows the end-of-text id."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    return list(cut_windows(ids, context_length, stride))


def encode_cloze(cloze: Cloze, tokenizer: Tokenizer, context_length: int) -> Passage:
    """A passage with its last word as the target; the first ids of a passage that is too long are dropped.

    Raises ValueError for a word that leaves no room for an id before it.
    """
    word = tokenizer.encode(cloze.word)
    if len(word) > context_length:
        raise ValueError(f"the word {cloze.word[:40]!r} does not fit the model's context of {context_length}")
    context = tokenizer.encode(cloze.context)[-(context_length + 1 - len(word)) :]
    return Passage([*context, *word], len(word))


# Detokenization: these texts were split into words for older models.
_ATTACH_LEFT = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|m|d|re|ve|ll)\b|n't\b|\.\.\.)(?=\s|$|[,.;:!?)\]}'\"])")
_ATTACH_RIGHT = re.compile(r"(?<!\S)([(\[{$£#]) (?=\S)")
_JOINED = re.compile(r" @([-,.])@ ")
_SLASH = re.compile(r"(?<=\S) / (?=\S)")
_QUOTE = re.compile(r'(?<!\S)"(?!\S)')
_POSSESSIVE = re.compile(r"(?<=s) '(?= )")
_SINGLE = re.compile(r"(?<!\S)' (\S.*?) '(?!\S)")
_HEADING = re.compile(r"^ (=(?: =)*) (.*?) (=(?: =)*) $", re.MULTILINE)
_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
_BRACKET = re.compile("|".join(_BRACKETS), re.IGNORECASE)


def join_wikitext(text: str) -> str:
    """Detokenize WikiText, including headings, numbers, hyphens and spaces around lines."""
    text = _HEADING.sub(_heading, text)
    text = _JOINED.sub(r"\1", text)
    return "\n".join(_join_line(line.strip(" ")) for line in text.split("\n"))


def join_treebank(text: str) -> str:
    """Detokenize the Penn Treebank, including its brackets, quotation marks and contractions."""
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
    line = _ATTACH_LEFT.sub(r"\1", line)
    line = _ATTACH_RIGHT.sub(r"\1", line)
    return _SLASH.sub("/", line)
