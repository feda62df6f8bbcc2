"""Cheap yes-or-no tests of a text's quality: seven of its characters, one of its language."""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray

LONG_LINE_CHARACTERS = 10_000
FEWEST_WORDS = 50  # a shorter text is not tested for its language
FREQUENT_WORDS = frozenset(
    ["the", "of", "and", "to", "that", "for", "with", "this", "are"]
    + ["from", "have", "not", "it", "as", "be", "which", "were", "you"]
)
"""Among English's most frequent; those that German, Dutch or French also use often are left out."""
FEWEST_FREQUENT = 0.05  # of a text's words; English prose has about 0.2

ODDITIES = {
    "replacement_character": "hold U+FFFD, which stands for bytes that were not text",
    "control_characters": "hold control characters",
    "very_long_line": f"have a line of over {LONG_LINE_CHARACTERS:,} characters",
    "mostly_not_letters": "are mostly not letters",
    "mostly_upper_case": "are mostly upper case",
    "mojibake": 'hold text decoded wrongly once (such as "Ã©", "â€™")',
    "not_latin": "have letters that are mostly not Latin",
    "few_english_words": "hold almost none of English's most frequent words",
}
NOT_ENGLISH_LOOKING = frozenset({"not_latin", "few_english_words"})

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")  # not tab, line feed, form feed, carriage return
# UTF-8's bytes 80 to BF, decoded as Latin-1 and as Windows-1252, after a lead byte decoded in the same way.
CONTINUATION = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
MOJIBAKE = re.compile(f"[ÂÃ][{CONTINUATION}]|â[€\x80][{CONTINUATION}]|ï[¿»][½¿]")

LETTER, UPPER, LATIN, BLANK = 1, 2, 4, 8
CODE_POINTS = 0x30000  # above are rare ideographs and no script in common use
LATIN_BLOCKS = (  # of Unicode: first and last code point
    *((0x41, 0x2AF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF)),
    *((0xAB30, 0xAB64), (0xFB00, 0xFB06), (0xFF21, 0xFF5A)),
)


def oddities_of(text: str) -> set[str]:
    """Which of ODDITIES a text has; none if it is empty."""
    if not text:
        return set()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    classes = _classes()[np.minimum(points, CODE_POINTS - 1)]
    letters = np.count_nonzero(classes & LETTER)
    upper, latin = np.count_nonzero(classes & UPPER), np.count_nonzero(classes & LATIN)
    visible = classes.size - np.count_nonzero(classes & BLANK)
    found = {
        "replacement_character": "\ufffd" in text,
        "control_characters": CONTROL.search(text) is not None,
        "very_long_line": max(map(len, text.split("\n"))) > LONG_LINE_CHARACTERS,
        "mostly_not_letters": 2 * letters < visible,
        "mostly_upper_case": 2 * upper > letters,
        "mojibake": MOJIBAKE.search(text) is not None,
        "not_latin": 2 * latin < letters,
        "few_english_words": _has_few_english_words(text),
    }
    return {name for name, is_so in found.items() if is_so}


def _has_few_english_words(text: str) -> bool:
    words = text.lower().split()
    known = sum(map(FREQUENT_WORDS.__contains__, words))
    return len(words) >= FEWEST_WORDS and known < FEWEST_FREQUENT * len(words)


@functools.cache
def _classes() -> NDArray[np.uint8]:
    """(CODE_POINTS,): the properties of each character, a sum of LETTER, UPPER, LATIN and BLANK."""
    characters = [chr(point) for point in range(CODE_POINTS)]
    letters = np.array([character.isalpha() for character in characters])
    is_latin = np.zeros(CODE_POINTS, dtype=bool)
    for first, last in LATIN_BLOCKS:
        is_latin[first : last + 1] = letters[first : last + 1]
    upper = np.array([character.isupper() for character in characters])
    blank = np.array([character.isspace() for character in characters])
    sums = LETTER * letters + UPPER * (upper & letters) + LATIN * is_latin + BLANK * blank
    classes: NDArray[np.uint8] = sums.astype(np.uint8)
    return classes
