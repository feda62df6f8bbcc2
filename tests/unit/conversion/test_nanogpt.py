"""Checkpoints of nanoGPT and build-nanogpt become the models that they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.conversion import safe_unpickle
from overnight.conversion.nanogpt import read_nanogpt
from overnight.model.gpt import GPT

Write = Callable[..., Path]


@pytest.mark.parametrize(("prefix", "padded"), [("", False), ("_orig_mod.", True)])
def test_a_checkpoint_is_the_model_it_was_written_from(
    write: Write, original: GPT, prefix: str, padded: bool
) -> None:
    model, tokenizer = read_nanogpt(write(prefix=prefix, padded=padded))
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(model(ids), original(ids))
    assert model.vocab_size == tokenizer.vocab_size
    assert not model.training


@pytest.mark.usefixtures("in_this_process")
def test_biases_that_were_left_out_are_zero(write: Write, original: GPT) -> None:
    model, _ = read_nanogpt(write(bias=False))
    for name, weight in model.weights().items():
        wanted = torch.zeros_like(weight) if name.endswith(".bias") else original.weights()[name]
        assert torch.equal(weight, wanted), name


def test_build_nanogpt_s_sizes_are_an_object(write_build_nanogpt: Write, original: GPT) -> None:
    model, _ = read_nanogpt(write_build_nanogpt())
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids), original(ids))


@pytest.mark.usefixtures("in_this_process")
def test_old_masks_are_left_aside(write: Write, original: GPT) -> None:
    path = write()
    content = torch.load(path, weights_only=True)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save(content, path)
    assert torch.equal(read_nanogpt(path)[0].wte.weight, original.wte.weight)


@pytest.mark.usefixtures("in_this_process")
def test_another_layout_would_be_noticed(write: Write, original: GPT) -> None:
    """The negative control: matrices turned, as Hugging Face keeps them, are another model or none."""
    path = write()
    content = torch.load(path, weights_only=True)
    square = content["model"]["transformer.h.0.attn.c_proj.weight"]
    content["model"]["transformer.h.0.attn.c_proj.weight"] = square.T.contiguous()
    torch.save(content, path)
    model, _ = read_nanogpt(path)
    ids = torch.arange(16)[None]
    assert not torch.allclose(model(ids), original(ids), atol=1e-3)


def args(**changes: Any) -> dict[str, Any]:
    return {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, **changes}


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"transformer.wte.weight": torch.zeros(282, 8), "transformer.wpe.weight": torch.zeros(16, 8)} | {
        f"transformer.{name.replace('_weight', '.weight')}": tensor for name, tensor in changes.items()
    }


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": {"a": 1}}, "more than named tensors"),
        ({"model": {1: torch.zeros(1)}}, "more than named tensors"),
        ({"model": [torch.zeros(1)]}, 'no table called "model"'),
        ({"model": {}}, "no embeddings"),
        ({"model": tensors(wte_weight=torch.zeros(65, 8))}, "65 ids are not GPT-2's"),
        ({"model": tensors()}, "n_layer=2, and its weights have 0"),
        ({"model": {"transformer.wte.weight": torch.zeros(8)}}, "no embeddings"),
        ({"model": {"lm_head.weight": torch.ones(2, 2)} | tensors()}, "lm_head.weight differs"),
        ({"model": tensors(wpe_weight=torch.zeros(16, 8).long())}, "no floating-point numbers"),
        ({"model": tensors(wpe_weight=torch.zeros(16, 8).to_sparse())}, "may run code|another kind"),
        ({"model_args": args(n_layer=10**12)}, "n_layer=1000000000000, and its weights have 2"),
        ({"model_args": args(n_head=0)}, "n_head=0"),
        ({"model_args": args(n_head=3)}, "n_head=3"),
        ({"model_args": {}}, "n_head=0"),
        ({"model_args": args(n_head="2")}, "not a whole number"),
        ({"model_args": args(n_head=torch.tensor(2))}, "not a whole number"),
        ({"model_args": None}, "neither model_args nor config"),
    ],
)
def test_what_is_no_gpt2_is_refused_in_one_sentence(
    write: Write, changes: dict[str, Any], complaint: str
) -> None:
    path = write(**changes)
    with pytest.raises(ValueError, match=complaint) as error:
        read_nanogpt(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_child_that_takes_too_long_is_ended(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(safe_unpickle, "_seconds", lambda size: 0.5)
    monkeypatch.setattr(safe_unpickle, "PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(ValueError, match="takes longer than its size explains"):
        safe_unpickle.read_pickled(path)


@pytest.mark.parametrize("program", ["import os; os.kill(os.getpid(), 9)", "1/0", "pass"])
def test_a_child_that_dies_is_told(write: Write, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    path = write()
    monkeypatch.setattr(safe_unpickle, "PROGRAM", program)
    with pytest.raises(ValueError, match="the process that opened it ended with status"):
        safe_unpickle.read_pickled(path)


@pytest.mark.usefixtures("in_this_process")
def test_an_old_torch_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ValueError, match=r"needs torch 2\.10 or newer, and this is 2\.9\.1\+cpu"):
        read_nanogpt(path)
