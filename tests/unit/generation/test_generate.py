"""Generation against naive twins without cache, batch and streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.generation import SamplingConfig
from overnight.generation.generate import (
    Decoding,
    KVCache,
    TextWriter,
    TokenGenerator,
    complete,
    generate,
    stream_text,
)
from overnight.generation.sampling import sample
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

GREEDY = SamplingConfig(temperature=0)
DRAWN = SamplingConfig(top_k=20, seed=3)
TOKENIZER = build_tokenizer("characters", ["abcdefghij é你🙂"])
END = TOKENIZER.end_of_text
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]


def build_model(context_length: int = 32, scale: float = 1.0, dropout: float = 0.0) -> GPT:
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": TOKENIZER.vocab_size}
    model = GPT(ModelConfig(**size, context_length=context_length, dropout=dropout))
    initialize(model, seed=1)
    with torch.no_grad():  # larger weights spread the logits, so that every mistake shows
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 * scale)
    return model.eval()


MODEL = build_model()


@torch.no_grad()
def naive(model: GPT, prompt: Sequence[int], decoding: Decoding, row: int = 0) -> list[int]:
    """One row, everything recomputed for each id."""
    context_length = model.config.context_length
    window, new = list(prompt), []
    while len(new) < decoding.max_new_tokens:
        if len(window) > context_length:
            window = window[-((context_length + 1) // 2) :]
        logits = model(torch.tensor([window]))[:, -1]
        token = int(sample(logits, decoding.sampling, [row], [len(prompt) + len(new)]))
        if token == decoding.end_of_text:
            break
        window.append(token)
        new.append(token)
    return new


@torch.inference_mode()
def error_of_cache(rows: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> float:
    """The greatest error of a logit after the prompts and after each new id, through the cache."""
    longest, worst = max(map(len, rows)), 0.0
    cache = KVCache(MODEL, [len(ids) for ids in rows], columns=longest + len(new[0]))
    reads = [[[0] * (longest - len(ids)) + list(ids) for ids in rows]]
    reads += [[[ids[step]] for ids in new] for step in range(len(new[0]))]
    for step, read in enumerate(reads):
        cache.extend(len(read[0]))
        logits = MODEL.head(MODEL.trunk(torch.tensor(read), cache)[:, -1])
        for row, ids in enumerate(rows):
            wanted = MODEL(torch.tensor([[*ids, *new[row][:step]]]))[0, -1]
            worst = max(worst, (logits[row] - wanted).abs().max().item())
    return worst


NEW = [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31], [32, 33, 34, 35]]


@pytest.mark.parametrize("rows", [1, 4])
def test_cached_logits_match_uncached(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single prompt, and a padded batch; and a mistake in either is detected."""
    assert error_of_cache(PROMPTS[:rows], NEW[:rows]) < 1e-5
    if rows == 1:
        monkeypatch.setattr(KVCache, "positions", lambda self, length: torch.arange(length))
    else:
        monkeypatch.setattr(KVCache, "_visible", lambda *_: None)
    assert error_of_cache(PROMPTS[:rows], NEW[:rows]) > 1e-2


SAMPLINGS = [GREEDY, DRAWN, SamplingConfig(top_k=None, temperature=5.0), SamplingConfig(top_k=5, top_p=0.5)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("context_length", [1, 2, 7, 32])
def test_row_does_not_depend_on_batch(sampling: SamplingConfig, context_length: int) -> None:
    """Also where some rows end before the others."""
    model = build_model(context_length)
    prompts = [ids[-context_length:] for ids in PROMPTS * 3]
    decoding = Decoding(max_new_tokens=60, sampling=sampling, end_of_text=END)
    together = generate(model, prompts, decoding)
    assert together == [naive(model, ids, decoding, row) for row, ids in enumerate(prompts)]
    alone = [generate(model, [ids], replace(decoding, first_row=row))[0] for row, ids in enumerate(prompts)]
    assert together == alone
    assert not any(END in ids for ids in together)
    if sampling.temperature > 1:
        assert len(set(map(len, together))) > 2


def test_ids_are_below_vocab_size() -> None:
    decoding = Decoding(max_new_tokens=100, sampling=SamplingConfig(top_k=None, temperature=100.0))
    (ids,) = generate(MODEL, [[1]], decoding)
    assert len(ids) == 100
    assert max(ids) < TOKENIZER.vocab_size < MODEL.wte.weight.shape[0]
    tokenizer = build_tokenizer("characters", ["a"])  # smaller than the model's vocabulary
    (completion,) = complete(MODEL, tokenizer, ["a"], decoding)
    assert max(completion.ids) < tokenizer.vocab_size < max(ids)


def test_empty_prompt_and_no_prompts() -> None:
    decoding = Decoding(max_new_tokens=5, sampling=DRAWN, end_of_text=END)
    assert generate(MODEL, [[]], decoding) == generate(MODEL, [[END]], decoding)
    assert generate(MODEL, [], Decoding()) == []
    assert generate(MODEL, [[1], [2]], Decoding(max_new_tokens=0)) == [[], []]


def test_generation_leaves_training_state_unchanged() -> None:
    model = build_model(dropout=0.5).train()
    torch.manual_seed(5)
    noise = torch.get_rng_state()
    decoding = Decoding(max_new_tokens=5, sampling=DRAWN)
    first = generate(model, PROMPTS, decoding)
    assert model.training
    assert torch.equal(torch.get_rng_state(), noise)
    assert first == generate(model, PROMPTS, decoding) == generate(model.eval(), PROMPTS, decoding)
    stream = stream_text(model.train(), TOKENIZER, "abc", decoding)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.gpu
def test_gpu_generates_same_ids() -> None:
    decoding = Decoding(max_new_tokens=40, sampling=GREEDY, end_of_text=END)  # beyond the context, too
    on_gpu = generate(build_model().to("cuda"), PROMPTS, decoding)
    assert on_gpu == generate(MODEL, PROMPTS, decoding)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1] * 33], {}, "33 tokens .* 32"),
        ([[1], [1] * 40], {}, "prompt 2"),
        ([[1, 10_000]], {}, "10000"),
        ([[-1]], {}, "id -1"),
        ([[]], {}, "empty"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([[1]], {"sampling": SamplingConfig(temperature=float("nan"))}, "temperature=nan"),
    ],
)
def test_invalid_requests_raise_before_iteration(
    prompts: list[list[int]], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGenerator(MODEL, prompts, replace(Decoding(), **changes))


def test_partial_character_is_held_back() -> None:
    smile = TOKENIZER.encode("🚀")  # not in the vocabulary: spelled by four bytes
    writer = TextWriter(TOKENIZER, [])
    assert [writer.write(token) for token in smile] == ["", "", "", "🚀"]
    assert [writer.write(token) for token in smile[:3]] == ["", "", ""]
    assert writer.finish() == TOKENIZER.decode(smile[:3]) == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc", max_size=30), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_first_stop_string(text: str, stop: list[str]) -> None:
    ids = TOKENIZER.encode(text)
    writer = TextWriter(TOKENIZER, stop)
    written, wanted = "", text
    for n in range(1, len(text) + 1):
        found = [text[:n].find(one) for one in stop if one in text[:n]]
        if found:
            wanted = text[: min(found)]
            break
    for token in ids:
        written += writer.write(token)
        assert wanted.startswith(written)  # no part of a stop string leaks
        if writer.stopped:
            break
    assert written + writer.finish() == wanted


def test_complete_matches_stream_text() -> None:
    prompts = ["abc", "", "a longer one é你🙂", "j"]
    decoding = Decoding(max_new_tokens=50, sampling=SamplingConfig(top_k=None, temperature=3.0))
    completions = complete(MODEL, TOKENIZER, prompts, decoding)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        pieces = list(stream_text(MODEL, TOKENIZER, prompt, replace(decoding, first_row=row)))
        assert "".join(pieces) == completion.text == TOKENIZER.decode(completion.ids)
        assert len(pieces) == len(completion.ids) + 1
        assert completion.ended_by == ("length" if len(completion.ids) == 50 else "end of text")


def test_stop_string_ends_completion() -> None:
    decoding = Decoding(max_new_tokens=200, sampling=SamplingConfig(top_k=None, temperature=5.0))
    whole, other = complete(MODEL, TOKENIZER, ["abc", "j"], decoding)
    stop = next(each for start in range(3, 9) if (each := whole.text[start : start + 2]) not in other.text)
    cut, rest = complete(MODEL, TOKENIZER, ["abc", "j"], replace(decoding, stop=(stop, "absent")))
    assert rest == other
    assert cut.ended_by == "stop string"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert TOKENIZER.decode(cut.ids).endswith(stop)
    assert "".join(stream_text(MODEL, TOKENIZER, "abc", replace(decoding, stop=(stop,)))) == cut.text
    with pytest.raises(ValueError, match="stop"):
        complete(MODEL, TOKENIZER, ["abc"], Decoding(stop=("",)))
