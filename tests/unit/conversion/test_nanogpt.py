"""Checkpoints of nanoGPT and build-nanogpt against the models that they were written from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overnight.conversion import safe_unpickle
from overnight.conversion.nanogpt import read_nanogpt
from overnight.model.gpt import GPT

Write = Callable[..., Path]


IDS = torch.arange(32).view(2, 16)


@pytest.mark.parametrize(
    "form",
    [{}, {"prefix": "_orig_mod.", "padded": True}, {"prefix": "module._orig_mod."}, {"bias": False}],
    ids="-".join,
)
def test_nanogpt_checkpoint_is_original_model(write: Write, original: GPT, form: dict[str, Any]) -> None:
    model, tokenizer = read_nanogpt(write(**form))
    has_biases = form.get("bias", True)  # zeros if not
    for name, weight in original.weights().items():
        wanted = weight if has_biases or not name.endswith(".bias") else torch.zeros_like(weight)
        assert torch.equal(model.weights()[name], wanted), name
    assert torch.equal(model(IDS), original(IDS)) == has_biases
    assert model.vocab_size == tokenizer.vocab_size
    assert not model.training


def test_build_nanogpt_config_object(write: Write, original: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes are an object of a class of the program that wrote it."""
    kind = dataclasses.make_dataclass("GPTConfig", args())
    kind.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", kind, raising=False)
    path = write()
    content = torch.load(path, weights_only=True)
    del content["model_args"]
    torch.save({**content, "config": kind(**args()), "step": 19072, "val_loss": 3.0}, path)
    model, _ = read_nanogpt(path)
    assert torch.equal(model(IDS), original(IDS))


@pytest.mark.usefixtures("in_this_process")
def test_nanogpt_mask_buffers_are_ignored(write: Write, original: GPT) -> None:
    path = write()
    content = torch.load(path, weights_only=True)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save(content, path)
    assert torch.equal(read_nanogpt(path)[0](IDS), original(IDS))
    # The negative control: matrices in Hugging Face's layout give another model.
    square = content["model"]["transformer.h.0.attn.c_proj.weight"]
    content["model"]["transformer.h.0.attn.c_proj.weight"] = square.T.contiguous()
    torch.save(content, path)
    assert not torch.allclose(read_nanogpt(path)[0](IDS), original(IDS), atol=1e-3)


@pytest.mark.usefixtures("in_this_process")
def test_numpy_numbers_and_parameters_are_read(write: Write, original: GPT) -> None:
    """A validation loss that was kept with the weights, and weights that were not detached."""
    path = write(best_val_loss=np.float64(1.5), iter_num=np.int64(3), lr=np.float32(0.1))
    content = torch.load(path, weights_only=False)
    content["model"] = {name: torch.nn.Parameter(tensor) for name, tensor in content["model"].items()}
    torch.save(content, path)
    assert torch.equal(read_nanogpt(path)[0](IDS), original(IDS))


def args(**changes: Any) -> dict[str, Any]:
    return {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, **changes}


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"transformer.wte.weight": torch.zeros(282, 8), "transformer.wpe.weight": torch.zeros(16, 8)} | {
        f"transformer.{name.replace('_weight', '.weight')}": tensor for name, tensor in changes.items()
    }


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"a": 1}}, "named tensors"),
        ({"model": {1: torch.zeros(1)}}, "named tensors"),
        ({"model": [torch.zeros(1)]}, "model"),
        ({"model": {}}, "wte"),
        ({"model": tensors(wte_weight=torch.zeros(65, 8))}, "65 ids"),
        ({"model": tensors()}, "n_layer=2"),
        ({"model": {"transformer.wte.weight": torch.zeros(8)}}, "wte"),
        ({"model": {"lm_head.weight": torch.ones(2, 2)} | tensors()}, "lm_head.weight"),
        ({"model": tensors(wpe_weight=torch.zeros(16, 8).long())}, "int64"),
        ({"model": tensors(wpe_weight=torch.zeros(16, 8).to_sparse())}, "may run code|sparse"),
        ({"model_args": args(n_layer=10**12)}, "n_layer=1000000000000"),
        ({"model_args": args(n_head=0)}, "n_head=0"),
        ({"model_args": args(n_head=3)}, "n_head=3"),
        ({"model_args": {}}, "n_head=0"),
        ({"model_args": args(n_head="2")}, "whole number"),
        ({"model_args": args(n_head=torch.tensor(2))}, "whole number"),
        ({"model_args": None}, "model_args"),
        ({"config": eval}, "eval"),
    ],
)
def test_invalid_checkpoint_is_refused(write: Write, changes: dict[str, Any], message: str) -> None:
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as error:
        read_nanogpt(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(60)", "too long"),
        *((program, "status") for program in ("import os; os.kill(os.getpid(), 9)", "1/0", "pass")),
    ],
)
def test_slow_or_dying_child_is_reported(
    write: Write, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    path = write()
    monkeypatch.setattr(safe_unpickle, "PROGRAM", program)
    if message == "too long":
        monkeypatch.setattr(safe_unpickle, "_time_limit", lambda size: 0.5)
    with pytest.raises(ValueError, match=message):
        safe_unpickle.read_pickled(path)


@pytest.mark.usefixtures("in_this_process")
def test_old_torch_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2\.10 .*2\.9\.1"):
        read_nanogpt(path)
