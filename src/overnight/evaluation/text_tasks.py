"""Texts that are evaluated as a whole: those of the GPT-2 paper (table 3), without the One Billion Words."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from overnight.evaluation.perplexity import Unit

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
        try:
            text = path.read_text(encoding="utf-8-sig")[:most]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}: download the file again") from None
        words = len(text.split()) + text.count("\n")  # as the publishers count: the end of a line is a word
        join = join_wikitext if self.format == "wikitext" else join_treebank
        return EvaluationText(join(text), words)


WIKITEXT_2 = "https://wikitext.smerity.com/wikitext-2-v1.zip"
WIKITEXT_103 = "https://wikitext.smerity.com/wikitext-103-v1.zip"
PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
ENWIK8 = "http://mattmahoney.net/dc/enwik8.zip"
TEXT8 = "http://mattmahoney.net/dc/text8.zip"
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
