"""Checkpoints of nanoGPT (ckpt.pt) and build-nanogpt (log/model_19072.pt) over GPT-2's vocabulary.

Their weights have GPT-2's names and nn.Linear's layout, (out, in), as ours. What differs: torch.compile's
prefix, the head written a second time, a vocabulary filled up to 50,304, and biases that may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, equal

from overnight.conversion.huggingface import BUFFERS, PREFIX
from overnight.conversion.safe_unpickle import read_pickled
from overnight.model.gpt import GPT, empty_model
from overnight.model.model_config import ModelConfig
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

TOKENIZER = "gpt2"
COMPILED = "_orig_mod."


def read_nanogpt(path: Path) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint, float32, on the CPU, in evaluation mode, and GPT-2's tokenizer.

    Nothing that the file holds is run. Raises ValueError, one sentence, for a file that is not such a
    checkpoint, or is damaged, or asks for anything but its tensors.
    """
    found = read_pickled(path)
    try:
        weights = _without_additions(found.weights)
        tokenizer = load_tokenizer(TOKENIZER)
        config = _find_config(weights, found.sizes, tokenizer)
        model = empty_model(config)
        shapes = {name: tuple(weight.shape) for name, weight in model.weights().items()}
        model.load_weights(_with_biases(weights, shapes, tokenizer.vocab_size))
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of a GPT-2 by nanoGPT: {error}") from None
    if found.is_nanogpt:
        echo(f"{path}: nanoGPT computes the GELU exactly, this model by GPT-2's own formula with tanh")
    return model.eval(), tokenizer


def _without_additions(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names. Raises ValueError if the head is not tied."""
    ours = {
        name.removeprefix(COMPILED).removeprefix(PREFIX): weight
        for name, weight in theirs.items()
        if not (name.endswith(BUFFERS) and weight.dim() == 4)
    }
    head = ours.pop("lm_head.weight", None)
    if head is not None and not equal(head, ours.get("wte.weight", head)):
        raise ValueError("lm_head.weight differs from wte.weight, and GPT-2's head is its embedding")
    if any(not weight.is_floating_point() for weight in ours.values()):
        raise ValueError("some of its weights are no floating-point numbers")
    return ours


def _find_config(
    weights: Mapping[str, Tensor], sizes: Mapping[str, int], tokenizer: Tokenizer
) -> ModelConfig:
    """The sizes that the weights have; of their heads nothing tells but `sizes`."""
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
    of_weights = {
        "n_layer": config.n_layer,
        "n_embd": n_embd,
        "block_size": config.context_length,
        "vocab_size": rows,
    }
    problems = config.problems() + [
        f"{name}={sizes[name]}, and its weights have {held}"
        for name, held in of_weights.items()
        if sizes.get(name, held) != held
    ]
    if not tokenizer.vocab_size <= rows <= config.padded_vocab_size():
        problems.append(
            f"its {rows:,} ids are not GPT-2's {tokenizer.vocab_size:,} (or "
            f"{config.padded_vocab_size():,} with padding), and it does not hold the tokenizer that they are"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _with_biases(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], vocab_size: int
) -> dict[str, Tensor]:
    """The weights with zeros for biases that were left out, without the rows that no id has."""
    biases = {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith(".bias")}
    return {**biases, **weights, "wte.weight": weights["wte.weight"][:vocab_size]}
