"""How fast GPT-2 124M is evaluated on a text: overnight beside what the peers do for a validation loss.

    python benchmarks/evaluate.py --peer ../build-nanogpt --nanogpt ../nanoGPT --repeats 3

All evaluate the same windows with the same weights, in the same precision and the same batches, so that their
losses, which are shown, must agree. The last side is the loop of Transformers' documentation, whose windows
overlap: it evaluates every token after at least half a context, and computes twice as much for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import measure
from checkouts import BUILD_NANOGPT, NANOGPT, read_definitions
from overnight.bench.worker import SEED, Rows
from overnight.model.model_config import ModelConfig
from overnight.training import ComputeConfig
from overnight.training.compute import autocast, resolve_compute
from peers import PEERS, Peer, build_peer, choose_precision
from text import read_ids

if TYPE_CHECKING:
    from overnight.data.loader import Batch
    from overnight.model.gpt import GPT

OURS, FORWARD, STRIDED = "overnight", "overnight's training forward", "Transformers, strided"
STRIDE_FRACTION = 0.5  # of a window, as in the documentation's example: 512 of 1,024
HEADINGS = ("side", "median ms", "min", "max", "tokens/s", "overnight is", "loss")
SAME_LOSS = 0.002  # a vocabulary padded with 47 ids adds 0.0009 nats to an untrained model's loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is evaluated, and how."""

    batches: Sequence[Batch]
    precision: str
    device: str

    @property
    def tokens(self) -> int:
        """Targets to evaluate."""
        return sum(batch.targets.numel() for batch in self.batches)


def evaluate_ours(model: GPT, question: Question) -> float:
    """What `overnight evaluate` does."""
    from overnight.evaluation.perplexity import evaluate_language_model

    token_bytes = [b"?"] * model.vocab_size  # what the ids spell does not matter to the time
    return evaluate_language_model(model, question.batches, token_bytes, question.precision).per("token")


def train_forward(model: GPT, question: Question) -> float:
    """The forward pass of `overnight train` on the same batches, everything kept for the backward pass."""
    from overnight.training.compute import NextTokenLoss

    asked = ComputeConfig(device=question.device, precision=question.precision, compile=False)
    compute = resolve_compute(asked, question.device)
    loss = NextTokenLoss(model, compute)
    total = 0.0
    model.train()
    for batch in question.batches:
        total += loss(batch.ids.to(question.device), batch.targets.to(question.device)).item()
    return total / question.tokens


def evaluate_theirs(peer: Peer, question: Question) -> float:
    """What build-nanogpt, nanoGPT and Transformers' Trainer do: the mean of the batches' means."""
    import torch

    total = 0.0
    peer.model.eval()
    with torch.no_grad():
        for batch in question.batches:
            ids_BT, targets_BT = (ids.to(question.device) for ids in (batch.ids, batch.targets))
            with autocast(question.device, question.precision):
                loss = peer.loss(peer.model, ids_BT, targets_BT)
            total += loss.item()
    return total / len(question.batches)


def evaluate_strided(peer: Peer, question: Question) -> float:
    """The perplexity loop of Transformers' documentation: one row at a time, its first half only context."""
    import torch

    text = torch.cat([batch.ids.flatten() for batch in question.batches]).to(question.device)
    window = question.batches[0].ids.shape[1]
    stride = int(window * STRIDE_FRACTION)
    nats, evaluated, seen = 0.0, 0, 0
    peer.model.eval()
    with torch.no_grad():
        for start in range(0, len(text), stride):
            ids_T = text[start : start + window]
            end = start + len(ids_T)
            labels_T = ids_T.clone()
            labels_T[: len(ids_T) - (end - seen)] = -100  # evaluated before
            with autocast(question.device, question.precision):
                loss = peer.model(ids_T[None], labels=labels_T[None]).loss
            targets = int((labels_T[1:] != -100).sum())
            nats, evaluated, seen = nats + loss.item() * targets, evaluated + targets, end
            if end == len(text):
                break
    return nats / evaluated


def sides_of(model: GPT, question: Question, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Every side that is there, as a function that evaluates and returns its loss."""
    sides: dict[str, Callable[[], float]] = {
        OURS: partial(evaluate_ours, model, question),
        FORWARD: partial(train_forward, model, question),
    }
    named = {"build-nanogpt": options.peer, "nanogpt": options.nanogpt}
    for name, checkout in named.items():
        if checkout is not None:
            peer = _placed(build_peer(name, checkout, model), question)
            sides[PEERS[name]] = partial(evaluate_theirs, peer, question)
    if importlib.util.find_spec("transformers") is not None:
        peer = _placed(build_peer("transformers", None, model), question)
        sides["Transformers"] = partial(evaluate_theirs, peer, question)
        sides[STRIDED] = partial(evaluate_strided, peer, question)
    return sides


def _placed(peer: Peer, question: Question) -> Peer:
    """With its model on the device."""
    peer.model.to(question.device)
    return peer


def report(options: argparse.Namespace) -> measure.Report:
    """Evaluate with all programs in turn. Raises ValueError, before any work, for invalid options."""
    import torch

    from overnight.model.gpt import GPT

    config, precision = check(options)
    tokens = options.batches * options.rows * options.context
    ids = np.resize(read_ids(options.text, options.data, options.bpe), tokens + 1)
    batch = Rows(ids, options.context).batch
    batches = [batch(number * options.rows, options.rows) for number in range(options.batches)]
    question = Question(batches=batches, precision=precision, device=options.device)
    model = GPT(config, seed=SEED).to(options.device)
    sides = sides_of(model, question, options)
    losses = {name: side() for name, side in sides.items()}  # the warm-up
    times = measure.interleave_times(sides, options.repeats)
    rows = [
        [
            name,
            *measure.spread(each),
            f"{tokens / statistics.median(each) * 1e3:,.0f}",
            measure.times_as_fast(times[OURS], each),
            f"{losses[name]:.4f}",
        ]
        for name, each in times.items()
    ]
    settings = {name: getattr(options, name) for name in ("rows", "context", "batches", "layers", "repeats")}
    where = f"{measure.on_device(options.device)}, {precision}"
    return measure.Report(
        title=f"{measure.model_name(config)} evaluated on {tokens:,} tokens on {where}",
        headings=HEADINGS,
        rows=rows,
        measured=times,
        settings={**settings, "threads": torch.get_num_threads()},
        notes=describe_losses(losses),
        machine=measure.describe_machine(options.device),
    )


def describe_losses(losses: dict[str, float]) -> list[str]:
    """Whether the sides evaluated the same, and what the ratios are."""
    comparable = [loss for name, loss in losses.items() if name != STRIDED]
    apart = max(comparable) - min(comparable)
    verdict = "." if apart <= SAME_LOSS else ": THE SIDES DO NOT AGREE."
    notes = [measure.OVERNIGHT_IS, f"The losses on the same windows lie within {apart:.5f} nats{verdict}"]
    if STRIDED in losses:
        notes.append(f"{STRIDED} evaluates every token after at least half a window: its loss is another.")
    return notes


def check(options: argparse.Namespace) -> tuple[ModelConfig, str]:
    """The model and its precision. Raises ValueError for what can't be measured."""
    measure.check_counts(options, "rows", "batches", "repeats")
    for program, checkout in ((BUILD_NANOGPT, options.peer), (NANOGPT, options.nanogpt)):
        if checkout is not None:
            read_definitions(program, checkout)
    config = measure.gpt2_124m(context_length=options.context, n_layer=options.layers)
    return config, choose_precision(options.device, options.precision)


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "peer nanogpt device layers text data bpe", repeats=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="the device's own if left out")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--batches", type=int, default=1, help="batches that are evaluated")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
