"""The memory that training takes on a device, by arithmetic on sizes.

Activations are counted in `activations`, what the optimizer keeps in `moments`.

Several processes may divide what they hold (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054). Weights,
gradients and moments are then counted parameter by parameter, as they are divided: under zero1 moments by
whole parameters, one owner each; under fsdp everything by rows, the same number for each process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from overnight.hardware import native_precision
from overnight.model.loss_kernels import rows_of_chunk
from overnight.model.model_config import ModelConfig, parameter_shapes
from overnight.model.presets import PRESETS
from overnight.training import Compute, OptimizerConfig, Sharding
from overnight.training.activations import (
    FLOAT32,
    kept_by_block,
    kept_inside_block,
    kept_per_token,
    mask_bytes,
    product_bytes,
)
from overnight.training.batch import CPU_TOKENS_AT_MOST, ROWS_AT_MOST
from overnight.training.moments import moment_shapes
from overnight.training.muon import orthogonal_bytes
from overnight.training.sharding import assign_parameters, count_sharers

ADAMW = OptimizerConfig()
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
    """What the optimizer keeps."""
    copies: int
    """16-bit copies of the weights, for matrix products."""
    activations: int
    """Activations that blocks keep for the backward pass."""
    logits: int
    """The output layer's logits, and the temporary tensors of the loss."""
    new_gradients: int
    """A compiled backward pass returns all gradients at once, before they are added to those of earlier
    micro-batches: what they take beyond the activations, which are freed by then."""
    update: int = 0
    """What the update takes beyond the activations, which are freed by then: Muon's batch of matrices, or a
    new gradient beside those of earlier micro-batches."""
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
    optimizer: OptimizerConfig = ADAMW,
) -> MemoryEstimate:
    """The memory of a step in one process, with micro-batches of `rows` rows of the full context.

    A step of a single micro-batch takes less, at most by its gradients, which do not exist during its forward
    pass. All processes are on one machine if `processes_per_machine` is None.
    """
    tokens = rows * model.context_length
    logits = _logits_bytes(model, tokens, compute)
    again = tokens * max(
        kept_by_block(model, compute, layer) - kept_inside_block(model, compute, layer)
        for layer in range(model.n_layer)
    )
    if not (compute.compile and compute.activation_checkpointing == "block"):
        again = max(0, again - logits)  # the loss has freed its memory by then, except in a compiled step
    activations = tokens * kept_per_token(model, compute) + again + mask_bytes(model, compute)
    sharers = count_sharers(compute.sharding, processes, processes_per_machine or processes)
    weights = FLOAT32 * _largest_shard(model, sharers)
    returns_all = compute.compile and sharers == 1  # sharded, a block's gradients are reduced at once
    copies = _copies_bytes(model, compute, sharers)
    new_gradients = max(0, weights - activations - logits) if returns_all else 0
    passing = activations + logits + new_gradients + copies
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        moments=_moments_bytes(model, compute, processes, sharers, optimizer),
        copies=copies,
        activations=activations,
        logits=logits,
        new_gradients=new_gradients,
        update=max(0, _update_bytes(model, compute, optimizer) // sharers - passing),
        gathered=_gathered_bytes(model) if sharers > 1 else 0,
    )


def try_shardings(
    model: ModelConfig, rows: int, compute: Compute, resources: Resources, optimizer: OptimizerConfig = ADAMW
) -> dict[Sharding, int]:
    """Bytes that one process needs with each sharding until one fits, in order of rising communication.

    The last one fits, or takes least. hsdp is tried on several machines with several processes each. With
    Muon, which updates whole matrices, neither hsdp nor fsdp is tried: they divide the rows of matrices.
    """
    _, memory_bytes, processes, processes_per_machine = resources
    found: dict[Sharding, int] = {}
    possible: list[Sharding] = ["none"]
    if processes > 1:
        possible += ["zero1"]
    if processes > 1 and optimizer.optimizer != "muon":
        possible += ["hsdp"] if 1 < processes_per_machine < processes else []
        possible += ["fsdp"]
    for sharding in possible:
        changed = dataclasses.replace(compute, sharding=sharding)
        needed = estimate_memory(model, rows, changed, processes, processes_per_machine, optimizer)
        found[sharding] = needed.together
        if fits_into(memory_bytes, found[sharding]):
            break
    return found


def choose_sharding(
    model: ModelConfig, rows: int, compute: Compute, resources: Resources, optimizer: OptimizerConfig = ADAMW
) -> Sharding:
    """The first of none, zero1, hsdp, fsdp with which `rows` rows fit into each process, or the last one.

    The last one is fsdp, with Muon zero1.
    """
    return [*try_shardings(model, rows, compute, resources, optimizer)][-1]


def rows_that_fit(
    model: ModelConfig, compute: Compute, resources: Resources, optimizer: OptimizerConfig = ADAMW
) -> int:
    """The largest micro-batch that fits into each process's memory, at most 64 rows; 1 if not even that does.

    On a CPU at most 4,096 tokens, since more gain no speed there.
    """
    most = ROWS_AT_MOST
    if resources.device == "cpu":
        most = max(1, CPU_TOKENS_AT_MOST // model.context_length)

    def fits(rows: int) -> bool:
        _, memory_bytes, processes, per_machine = resources
        needed = estimate_memory(model, rows, compute, processes, per_machine, optimizer)
        return fits_into(memory_bytes, needed.together)

    return next((rows for rows in range(most, 1, -1) if fits(rows)), 1)


class FitOption(NamedTuple):
    """Settings with which a model fits."""

    options: str
    """Options of the command line."""
    needed_bytes: int


def suggest_fits(
    model: ModelConfig,
    compute: Compute,
    possible_rows: Sequence[int],
    resources: Resources,
    optimizer: OptimizerConfig = ADAMW,
) -> Iterator[FitOption]:
    """Settings with which a model fits, with the largest of `possible_rows`; the cheapest in time first.

    A setting that costs time without allowing more rows is left out.
    """
    _, memory_bytes, processes, per_machine = resources
    most_rows = 0
    changes = [*REDUCTIONS]
    if processes > 1 and compute.sharding != "fsdp" and optimizer.optimizer != "muon":
        changes += [{**change, "sharding": "fsdp"} for change in REDUCTIONS]
    for change in changes:
        changed = dataclasses.replace(compute, **change)  # type: ignore[arg-type]
        if change and changed == compute:
            continue
        for rows in sorted(possible_rows, reverse=True):
            needed = estimate_memory(model, rows, changed, processes, per_machine, optimizer).together
            if rows > most_rows and fits_into(memory_bytes, needed):
                most_rows = rows
                options = {**change, "micro-batch-size": rows}
                words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
                yield FitOption(words, needed)


def largest_that_fits(
    compute: Compute, resources: Resources, optimizer: OptimizerConfig = ADAMW
) -> tuple[str, int] | None:
    """The largest published model that fits with one row, and its bytes; None if none does."""
    _, memory_bytes, processes, per_machine = resources
    for name, model in sorted(PRESETS.items(), key=lambda preset: -preset[1].parameter_count()):
        needed = estimate_memory(model, 1, compute, processes, per_machine, optimizer).together
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


def _moments_bytes(
    model: ModelConfig, compute: Compute, processes: int, sharers: int, optimizer: OptimizerConfig
) -> int:
    """What the optimizer keeps in the process that keeps most."""
    shapes = parameter_shapes(model)
    moments = moment_shapes(shapes, optimizer)
    kept = {name: sum(map(math.prod, each.values())) for name, each in moments.items()}
    if compute.sharding == "zero1":
        sizes, most = {name: math.prod(shape) for name, shape in shapes.items()}, [0] * processes
        for name, rank in assign_parameters(sizes, processes).items():
            most[rank] += kept[name]
        return FLOAT32 * max(most)
    return FLOAT32 * sum(-(-shape[0] // sharers) * kept[name] // shape[0] for name, shape in shapes.items())


def _update_bytes(model: ModelConfig, compute: Compute, optimizer: OptimizerConfig) -> int:
    """Temporary memory of the update: the largest gradient before it is added, or Muon's largest batch."""
    gradient = FLOAT32 * max(map(math.prod, parameter_shapes(model).values()))
    if optimizer.optimizer != "muon":
        return gradient
    is_short = compute.device == "cpu" and native_precision("cpu") == "bf16"
    return max(gradient, orthogonal_bytes(model, 2 if is_short else product_bytes(compute)))


def _copies_bytes(model: ModelConfig, compute: Compute, sharers: int) -> int:
    """16-bit copies of the weights, which autograd keeps for the backward pass, also of sharded weights.

    Sharded blocks with activation checkpointing make theirs again: compiled they keep none; eager, autocast
    keeps all of them until the forward pass ends, before there are gradients.
    """
    if product_bytes(compute) == FLOAT32:
        return 0
    shapes = parameter_shapes(model).items()
    whole = 2 * sum(math.prod(shape) for name, shape in shapes if _is_multiplied(name, model))
    if sharers == 1 or compute.activation_checkpointing == "none":
        return whole
    gathered = _gathered_bytes(model)
    weights_alone = gathered // 2
    return 0 if compute.compile else max(weights_alone // 2, whole + weights_alone - gathered)


def _is_multiplied(name: str, model: ModelConfig) -> bool:
    """True if a parameter is part of a product in 16 bits: no table, router, gain or normalization."""
    *_, part, last = ("", *name.split("."))
    if name == "wte.weight":
        return model.tied_head
    is_norm, is_table = part.startswith("ln_"), part in {"wpe", "table"}
    return not (is_norm or is_table or last in {"router", "balance", "stream_gain", "embedding_gain"})


def _gathered_bytes(model: ModelConfig) -> int:
    """Gathered weights and unreduced gradients of a backward pass, at its peak.

    The weights of the present block and of the next one, which is prefetched; the gradients of the present
    one and of the one before, which are being reduced. Parameters outside of blocks are gathered throughout.
    """
    shapes = parameter_shapes(model)
    blocks = [0] * model.n_layer
    for name, shape in shapes.items():
        if name.startswith("h."):
            blocks[int(name.split(".")[1])] += math.prod(shape)
    two = max((first + second for first, second in pairwise(blocks)), default=blocks[0])
    others = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("h."))
    return FLOAT32 * 2 * (two + others)


def _logits_bytes(model: ModelConfig, tokens: int, compute: Compute) -> int:
    """Bytes of logits. Compiled there is one copy, which their gradient replaces; eager there are several.

    Three in float32 of the full logits, and the tanh of a bound; of a chunk four, beside its logits and those
    of the chunk before. The chunked loss also sums the gradient of the output layer's weights in float32.
    """
    width, vocabulary = product_bytes(compute), model.padded_vocab_size()
    if compute.loss != "chunked":
        bounded = FLOAT32 if model.logit_softcap is not None else 0
        return tokens * vocabulary * ((width if compute.compile else 3 * FLOAT32) + bounded)
    chunk = min(tokens, rows_of_chunk(tokens, vocabulary))
    chunks_at_once = min(2, -(-tokens // chunk))
    is_copied = width != FLOAT32 or model.logit_softcap is not None  # then the scores are no logits
    each = (4 + is_copied) * FLOAT32 + chunks_at_once * width
    if compute.compile:
        each = width if width == FLOAT32 or model.logit_softcap is None else width + FLOAT32
    hidden = 0 if width == FLOAT32 else FLOAT32 * tokens * model.n_embd  # beside their 16-bit copy
    return chunk * vocabulary * each + FLOAT32 * vocabulary * model.n_embd + hidden
