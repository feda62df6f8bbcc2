"""Text that was cut into words for older models, put together again as people write it.

The GPT-2 paper (section 3.1) judges such texts after "invertible de-tokenizers", which it does not publish;
it saw gains of 2.5 to 5 in perplexity. What stands for a rare word, <unk>, stays as it is.
"""

from __future__ import annotations

import itertools
import re

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
