from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.preparation import documents as documents_module
from overnight.preparation.documents import (
    FATES,
    RECORD,
    Document,
    Records,
    document_hash,
    filter_documents,
    find_duplicates,
    is_validation,
    split_of,
)

TEXTS = [f"The document of number {number}." for number in range(4000)]


def fates(documents: list[Document], on_bad_text: str = "fail") -> list[str]:
    return [fate for _, fate in filter_documents(documents, on_bad_text)]


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


def record(text: str, fate: str = "kept") -> tuple[int, int, int, int, int]:
    digest = document_hash(text)
    halves = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
    return (*halves, len(text), len(text.encode()), FATES.index(fate))  # type: ignore[arg-type]


def records(texts: list[str]) -> Records:
    return np.array([record(text) for text in texts], dtype=RECORD)


@given(
    st.lists(st.lists(st.text("abc", max_size=2), max_size=12), min_size=1, max_size=5), st.integers(1, 50)
)
def test_of_equal_texts_the_first_is_kept(groups: list[list[str]], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            documents_module, "HASHES_AT_ONCE", at_once
        )  # so that they are looked for range by range
        duplicates = find_duplicates([records(texts) for texts in groups])
    kept = [
        text
        for texts, again in zip(groups, duplicates, strict=True)
        for text, is_duplicate in zip(texts, again, strict=True)
        if not is_duplicate
    ]
    assert kept == list(dict.fromkeys(text for texts in groups for text in texts))


def test_what_is_left_out_for_itself_is_nobodys_original() -> None:
    """A text skipped because its file was bad does not push out the sound copy behind it."""
    both = np.array([record("a", "skipped"), record("a"), record("a", "skipped")], dtype=RECORD)
    assert find_duplicates([both])[0].tolist() == [False, False, False]


def test_sides_are_chosen_alike_one_by_one_and_all_at_once() -> None:
    for fraction in (0.01, 0.1, 0.5):
        one_by_one = [split_of(text, fraction) == "validation" for text in TEXTS]
        assert is_validation(records(TEXTS), fraction).tolist() == one_by_one


def test_each_document_is_judged_by_itself() -> None:
    documents = [Document(text, "") for text in ("a", "", "a")]
    assert fates(documents) == ["kept", "empty", "kept"]


def test_unsound_text_meets_the_fate_that_was_asked_for() -> None:
    documents = [
        Document("one", ""),
        Document("tw\ufffd", "", damage="F is not UTF-8 at byte 7"),
        Document("tw\ufffd", "", damage="F is not UTF-8 at byte 17"),
        Document("one", ""),
    ]
    assert fates(documents, "skip") == ["kept", "skipped", "skipped", "kept"]
    assert fates(documents, "replace") == ["kept", "repaired", "repaired", "kept"]
    with pytest.raises(
        ValueError, match=r"F is not UTF-8 at byte 7; mend it, or give --on-bad-text replace or skip"
    ):
        fates(documents, "fail")
