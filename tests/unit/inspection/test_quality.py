from __future__ import annotations

import unicodedata

import pytest

from overnight.inspection.quality import BLANK, LATIN, LETTER, UPPER, _classes, oddities_of

ENGLISH = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered the rightful property of some one or other of their daughters."
)
GERMAN = (
    "Jemand musste Josef K. verleumdet haben, denn ohne dass er etwas Böses getan hätte, wurde er eines "
    "Morgens verhaftet. Die Köchin der Frau Grubach, seiner Zimmervermieterin, die ihm jeden Tag gegen acht "
    "Uhr früh das Frühstück brachte, kam diesmal nicht. Das war noch niemals geschehen. K. wartete noch ein "
    "Weilchen, sah von seinem Kopfkissen aus die alte Frau, die ihm gegenüber wohnte."
)
WORDS = "of the " * 1428  # 9,996 characters


@pytest.mark.parametrize(
    "expected, texts",
    [
        (None, ["", ENGLISH, ENGLISH.replace(" ", "\n\t"), ENGLISH + "\r\n\f", "Café für Ærø"]),
        ("replacement_character", [ENGLISH + "\ufffd"]),
        ("control_characters", [ENGLISH + "\x00", ENGLISH + "\x1b[0m", ENGLISH + "\x85"]),
        (None, [f"{WORDS}end", f"{WORDS}\nevery"]),
        ("very_long_line", [f"{WORDS}every"]),
        (None, ["ab12", "ABab"]),
        ("mostly_not_letters", ["12.5 | 13.6 | 14.7 | mean", "ab123"]),
        ("mostly_upper_case", [ENGLISH.upper(), "ABCab"]),
        ("few_english_words", [GERMAN]),
        (None, [GERMAN[:200]]),  # too short to tell
        ("not_latin", ["Привет, как дела", "你好,世界"]),
    ],
)
def test_oddities_of_text(expected, texts):
    assert [oddities_of(text) for text in texts] == [{expected} - {None}] * len(texts)


@pytest.mark.parametrize("text", ["Café", "it’s", "“quoted”", "a – b", "n° 5", "\ufeffmark", "naïve"])
def test_mojibake_is_found(text):
    """A text in UTF-8, read as Windows-1252 or Latin-1; as it is, it is sound."""
    assert "mojibake" not in oddities_of(text)
    assert "mojibake" in oddities_of(text.encode().decode("latin-1"))
    assert "mojibake" in oddities_of(text.encode().decode("cp1252", errors="ignore"))


def test_accented_letters_are_not_mojibake():
    for text in ("NÃO", "Ângela", "pâté", "â la carte", "ÃO", "São Paulo", "¿Qué?"):
        assert "mojibake" not in oddities_of(text)


def test_character_classes_are_those_of_unicode():
    for point in range(0, 0x30000, 7):
        character, classes = chr(point), int(_classes()[point])
        expected = (character.isalpha(), character.isalpha() and character.isupper(), character.isspace())
        assert (bool(classes & LETTER), bool(classes & UPPER), bool(classes & BLANK)) == expected


def test_latin_letters_are_those_named_latin():
    ordinals_and_micro = {0xAA, 0xB5, 0xBA}
    for point in [*range(0x2B0), *range(0x1E00, 0x1F00)]:
        is_latin = chr(point).isalpha() and unicodedata.name(chr(point)).startswith("LATIN ")
        assert bool(_classes()[point] & LATIN) == (is_latin or point in ordinals_and_micro)
    scripts = ("GREEK", "CYRILLIC", "HEBREW", "ARABIC", "DEVANAGARI", "THAI", "HANGUL", "CJK", "HIRAGANA")
    others = [p for p in range(0x2B0, 0x30000) if unicodedata.name(chr(p), "").startswith(scripts)]
    assert len(others) > 90_000
    assert not (_classes()[others] & LATIN).any()
