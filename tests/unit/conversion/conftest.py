"""Hand-made checkpoints in the formats of nanoGPT and build-nanogpt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.conversion import nanogpt, safe_unpickle
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("characters", ["the quick brown fox"])
SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=8, context_length=16, vocab_size=TOKENIZER.vocab_size)

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _small_gpt2_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces GPT-2's tokenizer by a small one, so that checkpoints are small."""
    monkeypatch.setattr(nanogpt, "load_tokenizer", lambda name: {"gpt2": TOKENIZER}[name])


@pytest.fixture(scope="session")
def original() -> GPT:
    """The model in the checkpoints; all its weights and biases differ."""
    model = GPT(SIZES, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.zero_padding()
    return model.eval()


@pytest.fixture
def write(original: GPT, tmp_path: Path) -> Write:
    """`write(bias=, padded=, prefix=, **changes)`: the path of a checkpoint of nanoGPT."""

    def write(*, bias: bool = True, padded: bool = False, prefix: str = "", **changes: Any) -> Path:
        state = {f"transformer.{name}": weight for name, weight in original.weights().items()}
        if padded:
            embedding = original.wte.weight.detach().clone()
            embedding[original.vocab_size :] = -1.0
            state["transformer.wte.weight"] = embedding
        state["lm_head.weight"] = embedding = state["transformer.wte.weight"]  # the tensor itself
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": len(embedding)}
        kept = [name for name in state if bias or not name.endswith(".bias")]
        content = {
            "model": {prefix + name: state[name] for name in kept},
            "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(9)}}},
            "model_args": {**sizes, "bias": bias, "dropout": 0.1},
            "iter_num": 3,
            "best_val_loss": torch.tensor(4.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
        }
        path = tmp_path / "ckpt.pt"
        torch.save({**content, **changes}, path)
        return path

    return write


@pytest.fixture
def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the child's program in this process, without its limits: two seconds less for each file."""

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[bytes]:
        *_, path, out = command
        output = tmp_path / "output"
        with pytest.MonkeyPatch.context() as patch, output.open("w") as file:
            patch.setattr(safe_unpickle, "limit_resources", lambda size: None)
            patch.setattr(sys, "stdout", file)
            status = safe_unpickle.convert_in_child(path, out)
        return subprocess.CompletedProcess(command, status, stdout=output.read_bytes())

    monkeypatch.setattr(subprocess, "run", run)
