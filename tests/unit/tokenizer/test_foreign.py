"""A tokenizer.json made elsewhere: its ids, and none of its special ones from text."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tokenizers

from overnight.tokenizer.tokenizer import Tokenizer
from overnight.tokenizer.tokenizer_json import Foreign

SPELLED_SPECIAL = ["<|endoftext|>", "<|user|>", "<tool>", "    ", "a<|user|>b    c"]


def test_the_ids_are_those_of_the_file(
    foreign: Tokenizer, foreign_content: dict[str, Any], documents: list[str]
) -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    for text in documents:
        plain = text.replace("    ", "")  # four blanks are one of its added tokens
        assert foreign.encode(plain) == reference.encode(plain).ids
    assert foreign.vocab_size == reference.get_vocab_size() == 502
    assert (foreign.name, foreign.end_of_text) == ("bpe-502", 0)


@pytest.mark.parametrize("text", SPELLED_SPECIAL)
def test_text_never_becomes_an_added_token(
    foreign: Tokenizer, foreign_content: dict[str, Any], text: str
) -> None:
    added = {token["id"] for token in foreign_content["added_tokens"]}
    assert len(added) == 4
    assert not added.intersection(foreign.encode(text))
    assert foreign.decode(foreign.encode(text)) == text
    believing = tokenizers.Tokenizer.from_str(json.dumps(foreign_content))
    assert added.intersection(believing.encode(text).ids)  # so the texts do test something


def test_only_special_ids_stand_for_no_text(foreign: Tokenizer) -> None:
    assert [id for id, spelled in enumerate(foreign.token_bytes()) if not spelled] == [0, 1]
    assert foreign.token_bytes()[-2:] == [b"<tool>", b"    "]


def changed(content: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(content), **values}


def test_the_end_of_text_is_found_or_named(foreign_content: dict[str, Any]) -> None:
    assert Foreign(foreign_content, "<|user|>").end_of_text == 1
    with pytest.raises(ValueError, match=r"no added token <\|end\|> to end a text; name the one that does"):
        Foreign(foreign_content, "<|end|>")
    unnamed = [token for token in foreign_content["added_tokens"] if token["content"] != "<|endoftext|>"]
    with pytest.raises(ValueError, match="as eos_token in a tokenizer_config.json beside it"):
        Foreign(changed(foreign_content, added_tokens=unnamed), None)


def test_what_loses_text_is_refused(foreign_content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decodes by WordPiece, which does not give back every text"):
        Foreign(changed(foreign_content, decoder={"type": "WordPiece"}), None)
    with pytest.raises(ValueError, match="decodes by joining its tokens"):
        Foreign(changed(foreign_content, decoder=None), None)
    with pytest.raises(ValueError, match="does not give back every text: 'two  blanks"):
        Foreign(changed(foreign_content, normalizer={"type": "Lowercase"}), None)


def test_a_model_that_reads_special_tokens_in_text_is_refused(foreign_content: dict[str, Any]) -> None:
    content = changed(foreign_content, pre_tokenizer=None)
    content["model"]["ignore_merges"] = True  # a text that is a token becomes it, and so does "<|user|>"
    with pytest.raises(ValueError, match="turns a text that spells"):
        Foreign(content, None)


def test_settings_for_batches_do_not_matter(foreign: Tokenizer, foreign_content: dict[str, Any]) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    read = Foreign(changed(foreign_content, truncation=cut), None)
    assert read.encode("the water") == foreign.encode("the water")
    assert read.fingerprint == foreign.fingerprint


@pytest.mark.parametrize("id", [-1, 2**31])
def test_an_absurd_id_is_refused(foreign_content: dict[str, Any], id: int) -> None:
    content = copy.deepcopy(foreign_content)
    content["added_tokens"][-1]["id"] = id
    with pytest.raises(ValueError, match="its ids are not numbers from 0"):
        Foreign(content, None)


def test_damage_is_told_in_one_sentence(foreign_content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it is damaged, or no tokenizer.json"):
        Foreign(changed(foreign_content, pre_tokenizer={"type": "Unheard"}), None)
