"""Variants of GPT-2 folders: same ids, logits and greedy text as Transformers, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, complete
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

TEXT = "First Citizen: Before we proceed any further, dignums, hear me speak. <|x|> Grüße, 你好"
PROMPTS = (TEXT, " dignums dignums", "a dignumsb", "Resolved. resolved to die", "x<|endoftext|>y <|x|>  z")
NEW_TOKENS = 24
VOCAB_SIZE = 320

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model whose greedy text does not repeat one token."""
    folder = tmp_path_factory.mktemp("original") / "model"
    torch.manual_seed(3)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=128, vocab_size=VOCAB_SIZE)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    write_huggingface(model, build_tokenizer(f"bpe-{VOCAB_SIZE}", [TEXT * 4]), folder)
    return folder


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def edit(name: str, folder: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**(read(folder / name) if (folder / name).is_file() else {}), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def edit_weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(prefix: str) -> Change:
    return partial(
        edit_weights,
        lambda weights: {prefix + name.removeprefix("transformer."): w for name, w in weights.items()},
    )


def cast(dtype: torch.dtype) -> Change:
    return partial(edit_weights, lambda weights: {name: w.to(dtype) for name, w in weights.items()})


def divide(folder: Path, *, keep_single: bool = False, keep_parts: bool = True) -> None:
    """Write the weights, all scaled by 1.5, in two parts with an index."""
    weights = load_file(folder / "model.safetensors")
    files = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(weights)}
    edit("model.safetensors.index.json", folder, metadata={"total_size": 1}, weight_map=files)
    for file in set(files.values()) if keep_parts else ():
        part = {name: weight * 1.5 for name, weight in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if not keep_single:
        (folder / "model.safetensors").unlink()


def add_token(folder: Path, content: str, **flags: bool) -> None:
    """Add a token to tokenizer.json in place of the last merge's id."""
    tokenizer = read(folder / "tokenizer.json")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    token = {"id": VOCAB_SIZE, "content": content, **plain, **flags}
    edit("tokenizer.json", folder, added_tokens=[*tokenizer["added_tokens"], token])
    resize(folder, VOCAB_SIZE + 1)


def add_token_in_config(folder: Path) -> None:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    token = {"content": "dignums", **plain}
    edit("tokenizer_config.json", folder, added_tokens_decoder={str(VOCAB_SIZE): token})
    resize(folder, VOCAB_SIZE + 1)


def resize(folder: Path, vocab_size: int) -> None:
    """Cut the embedding, or append rows that are the mean of the others."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        old = weights["transformer.wte.weight"]
        more = old.mean(dim=0, keepdim=True).expand(max(0, vocab_size - len(old)), -1)
        return {**weights, "transformer.wte.weight": torch.cat([old[:vocab_size], more]).contiguous()}

    edit_weights(change, folder)
    edit("config.json", folder, vocab_size=vocab_size)


def with_buffers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
    buffers = {f"transformer.h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    return {**weights, **buffers, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def with_head(scale: float, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"] * scale}


def without_end_id(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit(name, folder, eos_token_id=None)


def only_vocabulary_and_merges(folder: Path, added: str | None = None) -> None:
    """The files of the first tokenizers of Transformers."""
    model = read(folder / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if added is not None:
        edit("added_tokens.json", folder, **{added: VOCAB_SIZE})
        resize(folder, VOCAB_SIZE + 1)


def end_with(folder: Path, place: str, form: Callable[[list[int]], object]) -> None:
    """End texts at two of the ids that the greedy text contains."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)[0, prompt.input_ids.shape[1] :]
    firsts = list(dict.fromkeys(ids.tolist()))
    ends = [firsts[3], firsts[5]]
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    edit(place, folder, eos_token_id=form(ends))


BY_TRANSFORMERS: dict[str, Change] = {
    "plain": lambda folder: None,
    "one end id in generation_config": partial(end_with, place="generation_config.json", form=lambda e: e[1]),
    "end ids in generation_config": partial(end_with, place="generation_config.json", form=lambda e: e),
    "one end id in config": partial(end_with, place="config.json", form=lambda e: e[0]),
    "end ids in config": partial(end_with, place="config.json", form=lambda e: e),
    "no end id": lambda folder: (
        [edit(name, folder, eos_token_id=None) for name in ("config.json", "generation_config.json")] and None
    ),
    "added token": partial(add_token, content="dignums"),
    "added token, whole words": partial(add_token, content="dignums", single_word=True),
    "added token, normalized": partial(add_token, content="dignums", normalized=True),
    "special token": partial(add_token, content="<|x|>", special=True),
    "added token in tokenizer_config": add_token_in_config,
    "added token beside vocab.json": partial(only_vocabulary_and_merges, added="dignums"),
    "parts": divide,
    "parts and single": partial(divide, keep_single=True),
    "leftover index": partial(divide, keep_single=True, keep_parts=False),
    "without prefix": renamed(""),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float64": cast(torch.float64),
    "buffers": partial(edit_weights, with_buffers),
    "equal head": partial(edit_weights, partial(with_head, 1.0)),
    "larger vocabulary": partial(resize, vocab_size=VOCAB_SIZE + 48),
    "vocab.json and merges.txt": only_vocabulary_and_merges,
    "prefix space in tokenizer_config": partial(edit, "tokenizer_config.json", add_prefix_space=True),
}
"""Folders that Transformers reads: ours must equal what it computes from the same folder."""

OF_ORIGINAL: dict[str, Change] = {
    "compiled": renamed("_orig_mod.transformer."),
    "data parallel": renamed("module.transformer."),
    "both": renamed("module._orig_mod.transformer."),
}
"""Weights whose names Transformers does not know: ours must equal the original folder's."""

REFUSED: dict[str, tuple[Change, str]] = {
    "other head": (partial(edit_weights, partial(with_head, 2.0)), r"lm_head\.weight differs"),
    "untied": (partial(edit, "config.json", tie_word_embeddings=False), "tie_word_embeddings"),
    "NFC": (partial(edit, "tokenizer.json", normalizer={"type": "NFC"}), "normalizer NFC"),
    "added token with blanks": (partial(add_token, content="dignums", lstrip=True), "strips the whitespace"),
    "a name twice": (
        partial(edit_weights, lambda weights: {**weights, "ln_f.bias": weights["transformer.ln_f.bias"] + 1}),
        r"ln_f\.bias occurs twice",
    ),
    "text as end id": (partial(edit, "generation_config.json", eos_token_id="</s>"), "eos_token_id"),
}


def their_greedy(folder: Path, prompt: str) -> str:
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([their_ids(tokenizer, prompt)])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    if ends is not None and found[-1] in (ends if isinstance(ends, list) else [ends]):
        found.pop()
    return str(tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def their_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return ids


@torch.no_grad()
def assert_equal(opened: OpenedModel, folder: Path) -> None:
    """`opened` gives what Transformers computes from `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = their_ids(tokenizer, prompt)
        assert opened.tokenizer.encode(prompt) == ids
        batch = torch.tensor([ids])
        logits = model(batch).logits[..., : opened.model.vocab_size]
        torch.testing.assert_close(opened.model(batch), logits, atol=1e-4, rtol=1e-4)
    decoding = Decoding(
        max_new_tokens=NEW_TOKENS, sampling=SamplingConfig(temperature=0), end_ids=opened.end_ids
    )
    (ours,) = complete(opened.model, opened.tokenizer, [TEXT], decoding)
    assert ours.text == their_greedy(folder, TEXT)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("variant", BY_TRANSFORMERS)
def test_folder_equals_transformers(folder: Path, variant: str) -> None:
    BY_TRANSFORMERS[variant](folder)
    assert_equal(open_model(str(folder)), folder)


@pytest.mark.parametrize("variant", OF_ORIGINAL)
def test_wrapped_names_are_read(folder: Path, original: Path, variant: str) -> None:
    OF_ORIGINAL[variant](folder)
    assert_equal(open_model(str(folder)), original)


@pytest.mark.parametrize("variant", REFUSED)
def test_folder_is_refused(folder: Path, variant: str) -> None:
    change, named = REFUSED[variant]
    change(folder)
    with pytest.raises(ValueError, match=named):
        open_model(str(folder))


@pytest.mark.parametrize("variant", ["end ids in config", "added token", "parts"])
def test_difference_would_be_found(folder: Path, original: Path, variant: str) -> None:
    """Negative control: the original's model is not the variant's."""
    BY_TRANSFORMERS[variant](folder)
    with pytest.raises(AssertionError):
        assert_equal(open_model(str(original)), folder)
