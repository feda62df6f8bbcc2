"""The peers that are written in PyTorch: their models with our weights, and a training step as they do it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkouts import BUILD_NANOGPT, NANOGPT, Program, load_definitions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overnight.data.loader import Batch
    from overnight.model.gpt import GPT
    from overnight.model.model_config import ModelConfig

PEERS = {"build-nanogpt": "build-nanogpt", "nanogpt": "nanoGPT", "transformers": "Transformers"}
PADDING_MULTIPLE = 64  # build-nanogpt and nanoGPT ask for 50,304 ids: 50,257 rounded up to whole tiles
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer's model, and how its program uses it."""

    model: Any
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    """(the model or its compiled twin, ids, targets) -> mean nats per token."""
    build_optimizer: Callable[[float, str], Any]
    """(learning rate, "cpu" or "cuda") -> AdamW over the model's parameters."""
    allows_tf32: bool = True
    """Whether it lets a GPU shorten the float32 numbers that it multiplies."""
    pins_batches: bool = False
    """Whether its batches go to a GPU from pinned memory."""


class Step(NamedTuple):
    """What one step of a peer did."""

    loss: float
    """Mean nats per token, before the update."""
    seconds: float


# ---------------------------------------------------------------- models


def build_peer(name: str, checkout: Path | None, ours: GPT) -> Peer:
    """The peer called "build-nanogpt", "nanogpt" or "transformers", of our model's size, with its weights."""
    if name == "transformers":
        return build_transformers(ours)
    assert checkout is not None
    return {"build-nanogpt": build_build_nanogpt, "nanogpt": build_nanogpt}[name](checkout, ours)


def build_build_nanogpt(checkout: Path, ours: GPT) -> Peer:
    """build-nanogpt's GPT, the vocabulary padded as its program pads it."""
    model = _build_karpathy_s(BUILD_NANOGPT, checkout, ours.config)
    copy_weights(ours.weights(), model)
    return Peer(
        model=model,
        loss=lambda called, ids, targets: called(ids, targets)[1],
        build_optimizer=lambda learning_rate, device: model.configure_optimizers(
            weight_decay=WEIGHT_DECAY, learning_rate=learning_rate, device_type=device
        ),
    )


def build_nanogpt(checkout: Path, ours: GPT) -> Peer:
    """The GPT of nanoGPT as train.py builds it by default: padded, and without biases."""
    model = _build_karpathy_s(NANOGPT, checkout, ours.config, bias=False, dropout=0.0)
    copy_weights(ours.weights(), model)
    return Peer(
        model=model,
        loss=lambda called, ids, targets: called(ids, targets)[1],
        build_optimizer=lambda learning_rate, device: model.configure_optimizers(
            WEIGHT_DECAY, learning_rate, BETAS, device
        ),
        pins_batches=True,
    )


def _build_karpathy_s(program: Program, checkout: Path, config: ModelConfig, **others: Any) -> Any:
    assert config.vocab_size is not None
    module = load_definitions(program, checkout)
    padded = -(-config.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes |= {"block_size": config.context_length, "vocab_size": padded}
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**sizes, **others))


def build_transformers(ours: GPT) -> Peer:
    """Transformers' GPT2LMHeadModel, without dropout, with the optimizer that its Trainer takes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = ours.config
    sizes: dict[str, Any] = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    sizes |= {"n_positions": config.context_length, "vocab_size": config.vocab_size}
    dropouts: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id"))
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **ends, use_cache=False))
    model.loss_type = "ForCausalLM"  # what it takes in any case, after a warning
    copy_weights(ours.weights(), model)

    def build_optimizer(learning_rate: float, _device: str) -> Any:
        groups = [
            {
                "params": [weight for weight in model.parameters() if (weight.dim() >= 2) == decays],
                "weight_decay": WEIGHT_DECAY if decays else 0.0,
            }
            for decays in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)

    return Peer(
        model=model,
        loss=lambda called, ids, targets: called(ids, labels=targets, shift_labels=targets).loss,
        build_optimizer=build_optimizer,
        allows_tf32=False,
    )


def copy_weights(ours: Mapping[str, Tensor], theirs: nn.Module) -> None:
    """Give a peer's model our weights; the rows of a padded vocabulary stay as they are.

    Transformers keeps a matrix as (in, out). What a peer does not have is a bias, and ours is zero.
    """
    import torch

    is_transposed = {
        f"{name}.weight" for name, module in theirs.named_modules() if type(module).__name__ == "Conv1D"
    }
    parameters = dict(theirs.named_parameters())
    unnamed = {name.removeprefix("transformer."): name for name in parameters}
    assert unnamed.keys() <= ours.keys(), sorted(unnamed.keys() - ours.keys())
    for name in ours.keys() - unnamed.keys():
        assert name.endswith("bias"), name
        assert not ours[name].any(), f"{name} is not zero, and they have none"
    with torch.no_grad():
        for name, full_name in unnamed.items():
            weight = ours[name].T if full_name in is_transposed else ours[name]
            parameters[full_name][: weight.shape[0]].copy_(weight)


# ---------------------------------------------------------------- a step


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """What a peer's step needs besides the peer."""

    batches: Callable[[int, int], Batch]
    """(first row, rows) -> Batch, on the CPU."""
    rows: int
    """Of a micro-batch."""
    micro_batches: int
    precision: str
    """fp32 or bf16."""
    compile: bool
    device: str
    """cpu or cuda."""
    learning_rate: Callable[[int], float]
    """Step, counted from 0 -> learning rate."""


def choose_precision(device: str, precision: Any) -> str:
    """What `overnight` computes in there, if this is asked for. Raises ValueError for what is not there."""
    from overnight.distributed.world import open_world
    from overnight.training import ComputeConfig
    from overnight.training.compute import resolve_compute

    open_world(device)
    return str(resolve_compute(ComputeConfig(precision=precision), device).precision)


def precision_name(peer: Peer, stepping: Stepping) -> str:
    """What float32 matrices are really multiplied in, too: GPUs have a shorter way that must be allowed."""
    shortened = peer.allows_tf32 and stepping.precision == "fp32" and stepping.device == "cuda"
    return "tf32" if shortened else stepping.precision


def build_step(peer: Peer, stepping: Stepping) -> Callable[[], Step]:
    """A function that does the next step, as the loops of all three do it."""
    import torch

    from overnight.hardware import synchronize
    from overnight.training.compute import autocast

    device = stepping.device
    torch.set_float32_matmul_precision("high" if peer.allows_tf32 else "highest")
    peer.model.to(device)
    optimizer = peer.build_optimizer(stepping.learning_rate(0), device)
    called: Any = torch.compile(peer.model) if stepping.compile else peer.model
    finished = 0

    def step() -> Step:
        nonlocal finished
        started_at = time.perf_counter()
        called.train()
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for micro_batch in range(stepping.micro_batches):
            first_row = (finished * stepping.micro_batches + micro_batch) * stepping.rows
            batch = stepping.batches(first_row, stepping.rows)
            ids_BT, targets_BT = (_send(ids, device, peer) for ids in (batch.ids, batch.targets))
            with autocast(device, stepping.precision):
                loss = peer.loss(called, ids_BT, targets_BT) / stepping.micro_batches
            total += loss.detach()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = stepping.learning_rate(finished)
        optimizer.step()
        finished += 1
        synchronize(device)
        return Step(total.item(), time.perf_counter() - started_at)

    return step


def _send(ids: Tensor, device: str, peer: Peer) -> Tensor:
    """From pinned memory a copy is not waited for."""
    pinned = peer.pins_batches and device == "cuda"
    return ids.pin_memory().to(device, non_blocking=True) if pinned else ids.to(device)
