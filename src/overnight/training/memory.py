"""The memory that training takes on a device, by arithmetic on sizes.

Counted operation by operation: what autograd keeps of each for the backward pass. In 16 bits that is 36 C
bytes for a token and layer. Korthikanti et al. 2022, equation 2, without the T x T scores that fused
attention never writes, has 34 C: it counts dropout's masks, this the float32 of the residual stream.

Several processes may divide what they hold (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054). Weights,
gradients and moments are then counted parameter by parameter, as they are divided: under zero1 moments by
whole parameters, one owner each; under fsdp everything by rows, the same number for each process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from overnight.model.kernels import QUERIES
from overnight.model.loss_kernels import rows_of_chunk
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.model.presets import PRESETS
from overnight.training import Compute, Sharding
from overnight.training.batch import CPU_TOKENS_AT_MOST, ROWS_AT_MOST
from overnight.training.sharding import count_sharers, largest_share

FLOAT32 = 4
USABLE_FRACTION = 0.9  # the rest is the driver's, the libraries' and the allocator's fragmentation

REDUCTIONS: tuple[dict[str, str], ...] = (
    {},
    {"loss": "chunked"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "block"},
    {"activation_checkpointing": "block", "loss": "chunked"},
)
"""Settings that make a step take less memory, the cheapest in time first."""


class Resources(NamedTuple):
    """Memory and number of the processes of a run."""

    device: str
    memory_bytes: int
    """Memory of one process."""
    processes: int = 1
    processes_per_machine: int = 1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak bytes of a step in the process that needs most, by what they hold."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two moments."""
    copies: int
    """16-bit copies of the weights, for matrix products."""
    activations: int
    """Activations that blocks keep for the backward pass."""
    logits: int
    """The output layer's logits, and the temporary tensors of the loss."""
    new_gradients: int
    """A compiled backward pass returns all gradients at once, before they are added to those of earlier
    micro-batches: what they take beyond the activations, which are freed by then."""
    gathered: int = 0
    """Sharded weights that are gathered at the peak, and their gradients."""

    @property
    def together(self) -> int:
        """Total of all parts."""
        return sum(vars(self).values())


def estimate_memory(
    model: ModelConfig,
    rows: int,
    compute: Compute,
    processes: int = 1,
    processes_per_machine: int | None = None,
) -> MemoryEstimate:
    """The memory of a step in one process, with micro-batches of `rows` rows of the full context.

    A step of a single micro-batch takes less, at most by its gradients, which do not exist during its forward
    pass. All processes are on one machine if `processes_per_machine` is None.
    """
    tokens = rows * model.context_length
    logits = _logits_bytes(model, tokens, compute)
    again = tokens * (_kept_by_block(model, compute) - _kept_inside_block(model, compute))
    if not (compute.compile and compute.activation_checkpointing == "block"):
        again = max(0, again - logits)  # the loss has freed its memory by then, except in a compiled step
    activations = tokens * kept_per_token(model, compute) + again
    sharers = count_sharers(compute.sharding, processes, processes_per_machine or processes)
    weights = FLOAT32 * _largest_shard(model, sharers)
    each_moment = weights
    if compute.sharding == "zero1":
        sizes = {name: math.prod(shape) for name, shape in parameter_shapes(model).items()}
        each_moment = FLOAT32 * largest_share(sizes, processes)
    returns_all = compute.compile and sharers == 1  # sharded, a block's gradients are reduced at once
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        moments=2 * each_moment,
        copies=_copies_bytes(model, compute, sharers),
        activations=activations,
        logits=logits,
        new_gradients=max(0, weights - activations - logits) if returns_all else 0,
        gathered=_gathered_bytes(model) if sharers > 1 else 0,
    )


def try_shardings(
    model: ModelConfig,
    rows: int,
    compute: Compute,
    memory_bytes: int,
    processes: int,
    processes_per_machine: int,
) -> dict[Sharding, int]:
    """Bytes that one process needs with each sharding until one fits, in order of rising communication.

    The last one fits, or takes least. hsdp is tried on several machines with several processes each.
    `memory_bytes` is one process's.
    """
    found: dict[Sharding, int] = {}
    possible: list[Sharding] = ["none"]
    if processes > 1:
        possible += ["zero1"]
        possible += ["hsdp"] if 1 < processes_per_machine < processes else []
        possible += ["fsdp"]
    for sharding in possible:
        changed = dataclasses.replace(compute, sharding=sharding)
        found[sharding] = estimate_memory(model, rows, changed, processes, processes_per_machine).together
        if fits_into(memory_bytes, found[sharding]):
            break
    return found


def choose_sharding(model: ModelConfig, rows: int, compute: Compute, resources: Resources) -> Sharding:
    """The first of none, zero1, hsdp, fsdp with which `rows` rows fit into each process, or fsdp."""
    _, memory_bytes, processes, per_machine = resources
    return [*try_shardings(model, rows, compute, memory_bytes, processes, per_machine)][-1]


def rows_that_fit(model: ModelConfig, compute: Compute, resources: Resources) -> int:
    """The largest micro-batch that fits into each process's memory, at most 64 rows; 1 if not even that does.

    On a CPU at most 4,096 tokens, since more gain no speed there.
    """
    most = ROWS_AT_MOST
    if resources.device == "cpu":
        most = max(1, CPU_TOKENS_AT_MOST // model.context_length)
    _, memory_bytes, *processes = resources
    return next(
        (
            rows
            for rows in range(most, 1, -1)
            if fits_into(memory_bytes, estimate_memory(model, rows, compute, *processes).together)
        ),
        1,
    )


class FitOption(NamedTuple):
    """Settings with which a model fits."""

    options: str
    """Options of the command line."""
    needed_bytes: int


def suggest_fits(
    model: ModelConfig,
    compute: Compute,
    possible_rows: Sequence[int],
    memory_bytes: int,
    processes: int = 1,
    processes_per_machine: int | None = None,
) -> Iterator[FitOption]:
    """Settings with which a model fits, with the largest of `possible_rows`; the cheapest in time first.

    A setting that costs time without allowing more rows is left out.
    """
    most_rows = 0
    changes = [*REDUCTIONS]
    if processes > 1 and compute.sharding != "fsdp":
        changes += [{**change, "sharding": "fsdp"} for change in REDUCTIONS]
    for change in changes:
        changed = dataclasses.replace(compute, **change)  # type: ignore[arg-type]
        if change and changed == compute:
            continue
        for rows in sorted(possible_rows, reverse=True):
            needed = estimate_memory(model, rows, changed, processes, processes_per_machine).together
            if rows > most_rows and fits_into(memory_bytes, needed):
                most_rows = rows
                options = {**change, "micro-batch-size": rows}
                words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
                yield FitOption(words, needed)


def largest_that_fits(
    compute: Compute, memory_bytes: int, processes: int = 1, processes_per_machine: int | None = None
) -> tuple[str, int] | None:
    """The largest published model that fits with one row, and its bytes; None if none does."""
    for name, model in sorted(PRESETS.items(), key=lambda preset: -preset[1].parameter_count()):
        needed = estimate_memory(model, 1, compute, processes, processes_per_machine).together
        if fits_into(memory_bytes, needed):
            return name, needed
    return None


def fits_into(memory_bytes: int, needed_bytes: int) -> bool:
    """True if `needed_bytes` fit into the usable fraction of `memory_bytes`."""
    return needed_bytes <= USABLE_FRACTION * memory_bytes


def _largest_shard(model: ModelConfig, sharers: int) -> int:
    """Parameters in the process that holds most: ceil(rows / sharers) rows of each parameter."""
    shapes = parameter_shapes(model).values()
    return sum(-(-rows // sharers) * math.prod(columns) for rows, *columns in shapes)


def _copies_bytes(model: ModelConfig, compute: Compute, sharers: int) -> int:
    """16-bit copies of the weights, which autograd keeps for the backward pass, also of sharded weights.

    Sharded blocks with activation checkpointing make theirs again: compiled they keep none; eager, autocast
    keeps all of them until the forward pass ends, before there are gradients.
    """
    if _product_bytes(compute) == FLOAT32:
        return 0
    # All parameters but the layer norms and the position embedding are multiplied.
    whole = 2 * model.n_embd * (model.padded_vocab_size() + model.n_layer * (12 * model.n_embd + 9))
    if sharers == 1 or compute.activation_checkpointing == "none":
        return whole
    gathered = _gathered_bytes(model)
    weights_alone = gathered // 2
    return 0 if compute.compile else max(weights_alone // 2, whole + weights_alone - gathered)


def _gathered_bytes(model: ModelConfig) -> int:
    """Gathered weights and unreduced gradients of a backward pass, at its peak.

    The weights of the present block and of the next one, which is prefetched; the gradients of the present
    one and of the one before, which are being reduced. Parameters outside of blocks are gathered throughout.
    """
    shapes = parameter_shapes(model)
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("h.0."))
    others = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    return FLOAT32 * 2 * (min(2, model.n_layer) * block + others)


def kept_per_token(model: ModelConfig, compute: Compute) -> int:
    """Bytes of activations a token at the end of the trunk's forward pass."""
    stream = FLOAT32 * model.n_embd
    block = _kept_inside_block(model, compute)
    if compute.activation_checkpointing != "none":
        block += stream  # its input, from which it is computed again
    embedding = stream if model.dropout > 0 else 0
    head = (FLOAT32 + _product_bytes(compute)) * model.n_embd + 2 * FLOAT32
    ids_and_targets = 16
    return model.n_layer * block + embedding + head + ids_and_targets


def _kept_inside_block(model: ModelConfig, compute: Compute) -> int:
    """Bytes a token of a block that the backward pass does not compute again."""
    if compute.activation_checkpointing == "none":
        return _kept_by_block(model, compute)
    return _kept_by_products(model, compute) if compute.activation_checkpointing == "selective" else 0


def _kept_by_block(model: ModelConfig, compute: Compute) -> int:
    """Bytes a token of a block: inputs and statistics of both layer norms, and the input of every product."""
    C, width = model.n_embd, _product_bytes(compute)
    norms = 2 * (FLOAT32 * C + 2 * FLOAT32)
    qkv, mixed, inputs, gelu = 3 * C, C, 2 * C, 2 * 4 * C
    noise = 2 * C if model.dropout > 0 else 0
    return norms + width * (qkv + mixed + inputs + gelu + noise) + _kept_by_attention(model, compute)


def _kept_by_products(model: ModelConfig, compute: Compute) -> int:
    """Bytes a token of a block under selective checkpointing: the outputs of its products."""
    qkv, mixed, out, wide, narrow = 3, 1, 1, 4, 1
    products = _product_bytes(compute) * (qkv + mixed + out + wide + narrow) * model.n_embd
    return products + FLOAT32 * model.n_head


def _kept_by_attention(model: ModelConfig, compute: Compute) -> int:
    """Bytes a token besides queries, keys and values: a sum for each head, or the attention weights."""
    H, T, C = model.n_head, model.context_length, model.n_embd
    rounded = 0 if _product_bytes(compute) == FLOAT32 else 6 * C  # a softmax in 16 bits takes float32 inputs
    if model.dropout > 0 and compute.device == "cpu":  # torch has no fused kernel with dropout there
        return 12 * H * T + rounded
    if compute.attention == "math":
        return FLOAT32 * H * T + rounded
    if compute.attention == "blocks":  # the half of the square that is not in the future, in 16 bits
        return H * (T + QUERIES)
    return FLOAT32 * H


def _logits_bytes(model: ModelConfig, tokens: int, compute: Compute) -> int:
    """Bytes of logits. Compiled there is one copy, which their gradient replaces; eager there are several.

    Three in float32 of the full logits; of a chunk four, beside the logits of two chunks. The chunked loss
    also sums the gradient of the output layer's weights in float32.
    """
    width, vocabulary = _product_bytes(compute), model.padded_vocab_size()
    if compute.loss != "chunked":
        return tokens * vocabulary * (width if compute.compile else 3 * FLOAT32)
    chunk = min(tokens, rows_of_chunk(tokens, vocabulary))
    each = width if compute.compile else 4 * FLOAT32 + 2 * width
    return chunk * vocabulary * each + FLOAT32 * vocabulary * model.n_embd


def _product_bytes(compute: Compute) -> int:
    """Bytes of one number in a matrix product."""
    return 2 if compute.precision in {"bf16", "fp16"} else FLOAT32
