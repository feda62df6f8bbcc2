"""Words put together again: by examples written by hand, and nothing but blanks and marks changes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.evaluation.text_tasks import join_treebank, join_wikitext

WIKITEXT = [
    (" = Robert <unk> = \n", "= Robert <unk> =\n"),
    (" = = Early life = = \n \n He was born . \n", "== Early life ==\n\nHe was born.\n"),
    (" 1 @,@ 250 m ( 0 @.@ 8 mi ) , well @-@ known", "1,250 m (0.8 mi), well-known"),
    (' a " red " and a " blue " one ; the end', 'a "red" and a "blue" one; the end'),
    (" the dog 's tail , the dogs ' tails", "the dog's tail, the dogs' tails"),
    (" they 'd say it isn 't so", "they'd say it isn't so"),
    (" the ' old one ' is $ 5 / month [ sic ]", "the 'old one' is $5/month [sic]"),
    (" 50 % of it : all ! what ? yes ...", "50% of it: all! what? yes..."),
]
TREEBANK = [
    ("mr. vinken is n't N years old , he says", "mr. vinken isn't N years old, he says"),
    ("`` we do n't know , '' he said", '"we don\'t know," he said'),
    ("the -LRB- old -RRB- house 's $ N price", "the (old) house's $N price"),
    ("`` XXXXX ! ''", '"XXXXX!"'),
]


@pytest.mark.parametrize("cut, whole", WIKITEXT)
def test_wikitext(cut: str, whole: str) -> None:
    assert join_wikitext(cut) == whole


@pytest.mark.parametrize("cut, whole", TREEBANK)
def test_treebank(cut: str, whole: str) -> None:
    assert join_treebank(cut) == whole


WORDS = st.lists(st.sampled_from(["a", "dogs", "'s", "'", '"', "(", ")", ",", ".", "$", "5", "<unk>", "/"]))


@given(words=WORDS)
def test_nothing_but_blanks_is_lost(words: list[str]) -> None:
    text = " ".join(words)
    assert re.sub(r"\s", "", join_wikitext(text)) == re.sub(r"\s", "", text)
    if "'" not in words:  # two of them, end to end, are the treebank's quotation mark
        assert re.sub(r"\s", "", join_treebank(text)) == re.sub(r"\s", "", text)
