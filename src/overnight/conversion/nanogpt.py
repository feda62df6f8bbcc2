"""Checkpoints of nanoGPT (ckpt.pt) and build-nanogpt (log/model_19072.pt) over GPT-2's vocabulary.

Their weights have GPT-2's names and nn.Linear's layout (out, in), like ours. The differences: torch.compile's
prefix, the head stored a second time, a vocabulary padded to 50,304, and optional biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from overnight.conversion.gpt2_format import import_weights
from overnight.conversion.safe_unpickle import read_pickled
from overnight.model.gpt import GPT, empty_model
from overnight.model.model_config import ModelConfig
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

TOKENIZER = "gpt2"


def read_nanogpt(path: Path) -> tuple[GPT, Tokenizer]:
    """A checkpoint's model (float32, on the CPU, in evaluation mode) and GPT-2's tokenizer.

    No code of the file is run. Raises ValueError for a file that is not such a checkpoint, is damaged, or
    contains more than tensors, numbers and texts.
    """
    pickled = read_pickled(path)
    try:
        weights = import_weights(pickled.weights, is_conv1d=False)
        tokenizer = load_tokenizer(TOKENIZER)
        model = empty_model(_model_config(weights, pickled.sizes, tokenizer))
        weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size]
        biases = {
            name: torch.zeros_like(own) for name, own in model.weights().items() if name.endswith(".bias")
        }
        model.load_weights({**biases, **weights})
    except ValueError as error:
        raise ValueError(f"{path} is not a GPT-2 checkpoint of nanoGPT: {error}") from None
    if pickled.is_nanogpt:
        echo(f"{path}: nanoGPT computes the exact GELU; this model uses GPT-2's tanh approximation")
    return model.eval(), tokenizer


def _model_config(
    weights: Mapping[str, Tensor], sizes: Mapping[str, int], tokenizer: Tokenizer
) -> ModelConfig:
    """The model's sizes, from the weights; only the number of heads comes from `sizes`."""
    if any(name not in weights or weights[name].dim() != 2 for name in ("wte.weight", "wpe.weight")):
        raise ValueError("it has no embeddings wte and wpe")
    rows, n_embd = weights["wte.weight"].shape
    config = ModelConfig(
        n_layer=len({name.split(".")[1] for name in weights if name.startswith("h.")}),
        n_head=sizes.get("n_head", 0),
        n_embd=n_embd,
        context_length=len(weights["wpe.weight"]),
        vocab_size=tokenizer.vocab_size,
    )
    stored = {
        "n_layer": config.n_layer,
        "n_embd": n_embd,
        "block_size": config.context_length,
        "vocab_size": rows,
    }
    problems = config.problems() + [
        f"{name}={sizes[name]}, but the weights have {size}"
        for name, size in stored.items()
        if sizes.get(name, size) != size
    ]
    if not tokenizer.vocab_size <= rows <= config.padded_vocab_size():
        problems.append(
            f"its vocabulary has {rows:,} ids, not GPT-2's {tokenizer.vocab_size:,} (or "
            f"{config.padded_vocab_size():,} with padding), and the file does not contain its tokenizer"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return config
