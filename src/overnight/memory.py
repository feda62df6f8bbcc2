"""What training takes of a device's memory, and where it goes: arithmetic on sizes.

Counted operation by operation: what autograd keeps of each for the backward pass. In 16 bits that is 36 C
bytes for a token and layer. Korthikanti et al. 2022, equation 2, without the square that fused attention
never writes down, has 34 C: there dropout's masks are counted in, here the float32 of the residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overnight.model.config import PRESETS, ModelConfig
from overnight.parallel import ComputeConfig

FLOAT32 = 4
QUERIES = 128  # of a block of attention on a CPU: model/blocks.py's, which needs torch
USABLE_FRACTION = 0.9  # the rest is the driver's, the libraries' and the allocator's gaps

CHANGES: tuple[dict[str, str], ...] = (
    {},
    {"head": "chunked"},
    {"recompute": "selective"},
    {"recompute": "block"},
    {"recompute": "block", "head": "chunked"},
)
"""What makes a step smaller, the cheapest in time first."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the fullest moment of a step, by what they hold."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two running means."""
    copies: int
    """The weights once more in 16 bits, for the matrix products."""
    activations: int
    """What the blocks keep for the backward pass."""
    logits: int
    """The head's, and what the loss makes of them."""
    new_gradients: int
    """A compiled backward pass hands over all gradients at once, before they are added to those of the
    micro-batches before it: what these take beyond the activations, which are gone by then."""

    @property
    def together(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def estimate_memory(model: ModelConfig, rows: int, compute: ComputeConfig) -> MemoryEstimate:
    """What a step takes whose micro-batches have `rows` rows of the whole context.

    `compute` has everything decided. A step of a single micro-batch takes less, at most by its gradients,
    which are not there yet while it goes forward.
    """
    weights = FLOAT32 * count_stored(model)
    tokens = rows * model.context_length
    logits = _logits_bytes(model, tokens, compute)
    again = tokens * _again_per_token(model, compute)
    if not (compute.compile and compute.recompute == "block"):
        again = max(0, again - logits)  # the loss is done with by then; compiled, its memory is not yet free
    activations = tokens * kept_per_token(model, compute) + again
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        copies=0 if _product_bytes(compute) == FLOAT32 else 2 * _count_multiplied(model),
        activations=activations,
        logits=logits,
        new_gradients=max(0, weights - activations - logits) if compute.compile else 0,
    )


class WayOut(NamedTuple):
    """Settings with which a model fits that else does not."""

    options: str
    """As they are given on the command line."""
    needed_bytes: int


def find_ways_out(
    model: ModelConfig, compute: ComputeConfig, possible_rows: Sequence[int], memory_bytes: int
) -> Iterator[WayOut]:
    """What makes a model fit, with as many of the `possible_rows` as then do; the cheapest in time first.

    A change that costs time and does not let more rows fit is left out.
    """
    most_rows = 0
    for change in CHANGES:
        changed = dataclasses.replace(compute, **change)  # type: ignore[arg-type]
        if change and changed == compute:
            continue
        needed = {rows: estimate_memory(model, rows, changed).together for rows in possible_rows}
        rows = max((rows for rows in possible_rows if fits_into(memory_bytes, needed[rows])), default=0)
        if rows > most_rows:
            most_rows = rows
            options = {**change, "rows-per-micro-batch": rows}
            words = " ".join(f"--{name} {value}" for name, value in options.items())
            yield WayOut(words, needed[rows])


def largest_that_fits(compute: ComputeConfig, memory_bytes: int) -> tuple[str, int] | None:
    """The largest published model of which a single row fits, and its bytes; None if there is none."""
    needed = {name: estimate_memory(model, 1, compute).together for name, model in PRESETS.items()}
    fitting = [name for name in PRESETS if fits_into(memory_bytes, needed[name])]
    if not fitting:
        return None
    name = max(fitting, key=lambda name: PRESETS[name].parameter_count())
    return name, needed[name]


def fits_into(memory_bytes: int, needed_bytes: int) -> bool:
    """True if so much can be had of a memory of this size."""
    return needed_bytes <= USABLE_FRACTION * memory_bytes


def count_stored(model: ModelConfig) -> int:
    """Parameters as they lie in memory, the rows that pad the vocabulary among them."""
    assert model.vocab_size is not None
    return model.parameter_count() + (model.padded_vocab_size() - model.vocab_size) * model.n_embd


def kept_per_token(model: ModelConfig, compute: ComputeConfig) -> int:
    """Bytes of activations when the forward pass has come to the loss, which is not counted."""
    stream = FLOAT32 * model.n_embd
    block = _kept_by_block(model, compute)
    kept = {"none": block, "selective": stream + _kept_by_products(model, compute), "block": stream}
    embedding = stream if model.dropout > 0 else 0
    head = (FLOAT32 + _product_bytes(compute)) * model.n_embd + 2 * FLOAT32
    ids_and_targets = 16
    return model.n_layer * kept[compute.recompute] + embedding + head + ids_and_targets


def _again_per_token(model: ModelConfig, compute: ComputeConfig) -> int:
    """Bytes that the one block takes in addition which the backward pass is at, where it recomputes."""
    kept = {"none": _kept_by_block, "selective": _kept_by_products, "block": lambda *_: 0}
    return _kept_by_block(model, compute) - kept[compute.recompute](model, compute)


def _kept_by_block(model: ModelConfig, compute: ComputeConfig) -> int:
    """Bytes a token: of both halves the layer norm's input and statistics, and every product's input."""
    C, width = model.n_embd, _product_bytes(compute)
    norms = 2 * (FLOAT32 * C + 2 * FLOAT32)
    qkv, mixed, inputs, gelu = 3 * C, C, 2 * C, 2 * 4 * C
    noise = 2 * C if model.dropout > 0 else 0
    return norms + width * (qkv + mixed + inputs + gelu + noise) + _kept_by_attention(model, compute)


def _kept_by_products(model: ModelConfig, compute: ComputeConfig) -> int:
    """Bytes a token: what selective recomputation keeps of a block, which is what its products return."""
    qkv, mixed, out, wide, narrow = 3, 1, 1, 4, 1
    products = _product_bytes(compute) * (qkv + mixed + out + wide + narrow) * model.n_embd
    return products + FLOAT32 * model.n_head


def _kept_by_attention(model: ModelConfig, compute: ComputeConfig) -> int:
    """Bytes a token, beside queries, keys and values: a sum for each head, or the weights themselves."""
    H, T, C = model.n_head, model.context_length, model.n_embd
    assert compute.device is not None
    rounded = 0 if _product_bytes(compute) == FLOAT32 else 6 * C  # a softmax in 16 bits takes float32 inputs
    if model.dropout > 0 and compute.device == "cpu":  # torch has no fused kernel with dropout there
        return 12 * H * T + rounded
    if compute.attention == "plain":
        return FLOAT32 * H * T + rounded
    if compute.attention == "blocks":  # the half of the square that is not in the future, in 16 bits
        return H * (T + QUERIES)
    return FLOAT32 * H


def _logits_bytes(model: ModelConfig, tokens: int, compute: ComputeConfig) -> int:
    """Compiled, logits stand there once, and their gradient takes their place; eager, in several copies.

    Those are three in float32 of the whole head's, and four of a chunk's beside the logits of two chunks. A
    chunked head sums up the gradient of its weights in float32 besides.
    """
    width, vocabulary = _product_bytes(compute), model.padded_vocab_size()
    if compute.head != "chunked":
        return tokens * vocabulary * (width if compute.compile else 3 * FLOAT32)
    from overnight.loss import rows_of_chunk

    chunk = min(tokens, rows_of_chunk(tokens, vocabulary))
    each = width if compute.compile else 4 * FLOAT32 + 2 * width
    return chunk * vocabulary * each + FLOAT32 * vocabulary * model.n_embd


def _count_multiplied(model: ModelConfig) -> int:
    """Parameters of the products: all but the layer norms and the positions."""
    C = model.n_embd
    return model.padded_vocab_size() * C + model.n_layer * (12 * C * C + 9 * C)


def _product_bytes(compute: ComputeConfig) -> int:
    """Bytes of one number in a matrix product."""
    return 2 if compute.precision in {"bf16", "fp16"} else FLOAT32
