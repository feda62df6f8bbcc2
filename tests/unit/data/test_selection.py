from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.data.documents import Document
from overnight.data.selection import document_hash, judge, split_of

TEXTS = [f"The document of number {number}." for number in range(4000)]


def fates(documents: list[Document], on_bad_text: str = "fail") -> list[str]:
    return [fate for _, fate in judge(documents, on_bad_text)]


def test_the_hash_is_blake2b_of_the_utf_8() -> None:
    assert document_hash("日本") == hashlib.blake2b("日本".encode(), digest_size=16).digest()


def test_a_document_never_changes_sides() -> None:
    """Not when others come, go or move: its side is asked of its text alone, and these are written down."""
    sides = {text: split_of(text, 0.1) for text in TEXTS}
    held_out = [number for number, text in enumerate(TEXTS) if sides[text] == "validation"]
    assert held_out[:6] == [6, 7, 28, 35, 39, 53]
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS) // 2)
    assert all(split_of(text, 0.1) == sides[text] for text in shuffled)


def test_the_share_is_about_what_was_asked_for() -> None:
    for fraction in (0.01, 0.1, 0.5):
        held_out = sum(split_of(text, fraction) == "validation" for text in TEXTS)
        # The standard deviation of a share of 4,000 is at most 0.8%.
        assert abs(held_out / len(TEXTS) - fraction) < 0.03


def test_a_larger_share_only_adds_to_a_smaller_one() -> None:
    small = {text for text in TEXTS if split_of(text, 0.05) == "validation"}
    large = {text for text in TEXTS if split_of(text, 0.2) == "validation"}
    assert small < large


@given(st.lists(st.text(max_size=3), max_size=30))
def test_of_equal_texts_the_first_is_kept(texts: list[str]) -> None:
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    kept = [document.text for document, fate in judge(documents, "fail") if fate == "kept"]
    assert kept == list(dict.fromkeys(text for text in texts if text))
    assert fates(documents).count("empty") == texts.count("")
    assert len(fates(documents)) == len(texts)


def test_unsound_text_meets_the_fate_that_was_asked_for() -> None:
    documents = [
        Document("one", ""),
        Document("tw\ufffd", "", damage="F is not UTF-8 at byte 7"),
        Document("tw\ufffd", "", damage="F is not UTF-8 at byte 17"),
        Document("one", ""),
    ]
    assert fates(documents, "skip") == ["kept", "skipped", "skipped", "duplicate"]
    assert fates(documents, "replace") == ["kept", "repaired", "duplicate", "duplicate"]
    with pytest.raises(
        ValueError, match=r"F is not UTF-8 at byte 7; mend it, or give --on-bad-text replace or skip"
    ):
        fates(documents, "fail")
