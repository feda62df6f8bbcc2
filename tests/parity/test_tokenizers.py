"""Our ids equal those of tiktoken, Transformers and `tokenizers`, from the same files."""

from __future__ import annotations

import inspect
import json

import pytest
import tiktoken
import tiktoken.load
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from overnight.tokenizer import bpe
from overnight.tokenizer.open_tokenizer import build_tokenizer, load_tokenizer

UNUSUAL = (
    "it's, IT'S, they'll, 'sfoo, x'9",
    "  two  blanks\tand tabs\t\n\r\n \n at the end  \n ",
    "1,024 ²³ ½ ⅷ ١٢٣ १२३ 3.14e-5",
    "naïve cafe\u0301 ﬁne straße ǅ",
    "中文分词 日本語テスト 한국어 ภาษาไทย עברית العربية",
    "🙂 👩‍👩‍👧 🇩🇪 \ufe0f \u200b \ufeff \0 \x1c \x85 \xa0 \u2028 \u3000x",
    "a<|endoftext|>b <|endo ftext|>",
    "",
)
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=60),  # lone surrogates, too
    st.text("ab 1!'s\n\t\xa0\u3000é中🙂", max_size=100),
)


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "gpt2-bpe"


@pytest.fixture(scope="module")
def gpt2(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def texts(shared_data):
    shakespeare = (shared_data / "shakespeare/input.txt").read_text(encoding="utf-8")
    wikipedia = (shared_data / "wikitext-2/wiki.valid.tokens").read_text(encoding="utf-8")
    return [*UNUSUAL, shakespeare[:100_000], wikipedia[:100_000]]


@pytest.fixture(scope="module")
def by_tiktoken(folder):
    """The GPT-2 of tiktoken, from the same two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # keeps no copies
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"), str(folder / "encoder.json")
        )
    return tiktoken.Encoding(
        "reference",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def test_addresses_and_hashes_equal_tiktokens():
    published = inspect.getsource(openai_public.gpt2)
    for name, sha256 in bpe.FILES.items():
        assert f'"{bpe.ADDRESS}/{name}"' in published
        assert f'"{sha256}"' in published


def test_gpt2_equals_tiktoken(gpt2, by_tiktoken, texts):
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (by_tiktoken.n_vocab, by_tiktoken.eot_token)
    for text, ids in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert ids.tolist() == by_tiktoken.encode_ordinary(text)
        assert gpt2.decode_bytes(ids.tolist()) == by_tiktoken.decode_bytes(ids.tolist())


@pytest.mark.parametrize("name", ["gpt2", "bpe-1000", "characters"])
@pytest.mark.parametrize("with_model", [False, True])
def test_saved_tokenizer_opens_in_transformers(folder, texts, tmp_path, name, with_model):
    ours = load_tokenizer(folder) if name == "gpt2" else build_tokenizer(name, texts[-2:])
    ours.save(tmp_path)
    if with_model:
        about = {"model_type": "gpt2", "bos_token_id": ours.end_of_text, "eos_token_id": ours.end_of_text}
        (tmp_path / "config.json").write_text(json.dumps({**about, "vocab_size": ours.vocab_size}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id} == {ours.end_of_text}
    for text in texts:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    theirs.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


def test_bpe_training_equals_tokenizers(texts):
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(texts[-2:], vocab_size=999, min_frequency=0, show_progress=False)
    ours = build_tokenizer("bpe-1000", texts[-2:])
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.end_of_text == 999
