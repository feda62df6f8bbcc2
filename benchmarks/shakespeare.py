"""How long nanoGPT's first example for a CPU takes, from the command to the trained model.

    python benchmarks/shakespeare.py --nanogpt ../nanoGPT --text input.txt --repeats 3

Tiny shakespeare, character by character, as nanoGPT's README trains it on a MacBook: 4 layers, 128 wide,
2,000 steps of 12 rows of 64. The same recipe on the same split (the first 90% of the file), and as many
tokens evaluated on the way. What is timed is the whole process, its imports included; the preparation of the
text is not. Afterwards both models are evaluated by one procedure on the whole validation split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import measure
from checkouts import NANOGPT, fingerprint, load_definitions, read_definitions
from overnight.distributed.launcher import environment_of_process

if TYPE_CHECKING:
    from torch import Tensor

OURS, THEIRS = "overnight", "nanoGPT"
HEADINGS = (
    *("side", "median s", "min", "max", "CPU s", "ms/step", "validation loss", "least", "most"),
    "overnight takes",
)
CONTEXT, ROWS = 64, 12
EVALUATE_EVERY, BATCHES_OF_EVALUATION, SPLITS = 250, 20, 2  # nanoGPT evaluates batches of both splits
ROWS_AT_ONCE = 256
PRINTED_STEP = re.compile(r"^iter \d+: .* time ([0-9.]+)ms", re.MULTILINE)
SEED = 1337  # nanoGPT's own
ALONE = environment_of_process(large_pages=False)  # of both sides


class Training(NamedTuple):
    """One whole run."""

    took: measure.Finished
    step_milliseconds: float
    """Of the median step."""
    loss: float
    """Nats per character over the whole validation split."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The text, as nanoGPT's prepare.py divides it: by characters, not by documents."""

    train: str
    validation: str


def read_split(text: Path | None, checkout: Path | None) -> Split:
    """Of the file that is named, of the cache's or the checkout's. Raises ValueError if there is none."""
    from overnight.files import cache_path

    places = [cache_path() / "shakespeare" / "input.txt"]
    if checkout is not None:
        places.append(checkout / "data" / "shakespeare_char" / "input.txt")
    text = text or next((place for place in places if place.is_file()), places[0])
    if not text.is_file():
        raise ValueError(
            f"there is no file {text}: name with --text the input.txt of tiny shakespeare, from "
            "https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare"
        )
    characters = text.read_text(encoding="utf-8")
    end = int(0.9 * len(characters))
    if len(characters) - end <= CONTEXT:
        raise ValueError(f"{text} is too short: its last tenth must be longer than {CONTEXT} characters")
    return Split(train=characters[:end], validation=characters[end:])


# ---------------------------------------------------------------- ours


def prepare_ours(split: Split, folder: Path) -> None:
    """A folder as `overnight prepare` writes it, with exactly that split."""
    from overnight import __version__
    from overnight.data.shards import Manifest, write_manifest, write_split
    from overnight.tokenizer.characters import train_characters

    tokenizer = train_characters([split.train, split.validation])
    folder.mkdir(parents=True)
    shards: dict[str, Any] = {}
    for name, text in (("train", split.train), ("validation", split.validation)):
        ids = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(text)]).astype(np.uint32)
        documents = [(ids, len(text.encode()))]
        shards[name] = write_split(folder, name, documents, tokenizer.vocab_size, shard_tokens=ids.size)
    tokenizer.save(folder / "tokenizer")
    manifest = Manifest(
        overnight_version=__version__,
        source="shakespeare",
        licence="public domain",
        request={"validation_fraction": None},
        split_rule="the first 90% of the characters train, as in nanoGPT",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        documents=2,
        duplicate_documents=0,
        empty_documents=0,
        skipped_documents=0,
        repaired_documents=0,
        **shards,
    )
    write_manifest(folder, manifest)


def command_of_ours(data: Path, steps: int, seed: int) -> list[str]:
    """`overnight train`: everything that is science is nanoGPT's, the rest is what it chooses for itself."""
    evaluation_tokens = SPLITS * BATCHES_OF_EVALUATION * ROWS * CONTEXT
    settings: dict[str, object] = {
        **{"run-name": "measured", "data": data, "seed": seed},
        **{"n-layer": 4, "n-head": 4, "n-embd": 128, "context-length": CONTEXT, "dropout": 0.0},
        **{"peak-learning-rate": 1e-3, "beta1": 0.9, "beta2": 0.99},
        **{"weight-decay": 0.1, "max-grad-norm": 1.0},
        **{"total-steps": steps, "warmup-steps": min(100, steps), "final-learning-rate-fraction": 0.1},
        **{"tokens-per-step": ROWS * CONTEXT, "evaluate-every-steps": evaluate_every(steps)},
        **{"evaluation-tokens": evaluation_tokens, "sample-every-steps": None, "device": "cpu"},
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*measure.overnight_command(), "train", "shakespeare-char-cpu", *options]


def train_ours(folder: Path, steps: int, seeds: itertools.count[int], evaluate: Evaluate) -> Training:
    """One run, in a folder of its own, each with another seed."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    took = measure.run_process(command_of_ours(folder / "prepared", steps, next(seeds)), folder, ALONE)
    run = folder / "runs" / "measured"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    milliseconds = statistics.median(json.loads(line)["milliseconds"] for line in lines)
    return Training(took, milliseconds, evaluate(load_ours(run)))


def load_ours(run: Path) -> Callable[[Tensor], Tensor]:
    """The trained model as a function ids -> logits."""
    from overnight.conversion.open_model import open_model

    return open_model(str(run)).model


# ---------------------------------------------------------------- theirs


def prepare_theirs(checkout: Path, split: Split, folder: Path) -> None:
    """A copy of the checkout, and in it the text as its own prepare.py has it."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pkl", "out*"))
    place = folder / "data" / "shakespeare_char"
    (place / "input.txt").write_text(split.train + split.validation, encoding="utf-8")
    measure.run_process([sys.executable, str(place / "prepare.py")], folder, ALONE)


def command_of_theirs(steps: int) -> list[str]:
    """The command of nanoGPT's README for a CPU."""
    flags = {"device": "cpu", "compile": False, "eval_iters": BATCHES_OF_EVALUATION, "log_interval": 1}
    flags |= {"block_size": CONTEXT, "batch_size": ROWS, "n_layer": 4, "n_head": 4, "n_embd": 128}
    flags |= {"max_iters": steps, "lr_decay_iters": steps, "dropout": 0.0}
    if steps < EVALUATE_EVERY:  # a quick try
        flags |= {"eval_interval": steps, "warmup_iters": min(100, steps - 1)}
    options = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *options]


def train_theirs(folder: Path, steps: int, evaluate: Evaluate) -> Training:
    """One run. Its seed is fixed."""
    out = folder / "out-shakespeare-char"
    shutil.rmtree(out, ignore_errors=True)
    took = measure.run_process(command_of_theirs(steps), folder, ALONE)
    milliseconds = statistics.median(map(float, PRINTED_STEP.findall(took.output)))
    return Training(took, milliseconds, evaluate(load_theirs(folder, out / "ckpt.pt")))


def load_theirs(checkout: Path, checkpoint: Path) -> Callable[[Tensor], Tensor]:
    """The trained model as a function ids -> logits."""
    import torch

    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    module = load_definitions(NANOGPT, checkout)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    return lambda ids_BT: model(ids_BT, ids_BT)[0]  # without targets it would give the last position only


# ---------------------------------------------------------------- both


Evaluate = Callable[[Callable[[Any], Any]], float]


def evaluate_every(steps: int) -> int:
    """Steps between evaluations."""
    return min(EVALUATE_EVERY, steps)


def encode(split: Split) -> NDArray[np.int64]:
    """The validation split's ids: the place of each character in the sorted alphabet, on both sides."""
    alphabet = sorted(set(split.train + split.validation))
    ids = {character: number for number, character in enumerate(alphabet)}
    return np.array([ids[character] for character in split.validation])


def evaluate_whole(logits: Callable[[Tensor], Tensor], ids: NDArray[np.int64]) -> float:
    """Nats per character over all windows of 64 characters that lie end to end, at all their positions."""
    import torch

    from overnight.bench.worker import Rows
    from overnight.model.loss import cross_entropy_nats

    windows, batch = (ids.size - 1) // CONTEXT, Rows(ids, CONTEXT).batch
    nats = 0.0
    with torch.inference_mode():
        for first in range(0, windows, ROWS_AT_ONCE):
            evaluated = batch(first, min(ROWS_AT_ONCE, windows - first))
            nats += cross_entropy_nats(logits(evaluated.ids), evaluated.targets).item()
    return nats / (windows * CONTEXT)


def report(options: argparse.Namespace) -> measure.Report:
    """Train with both in turn. Raises ValueError, before any work, for invalid options."""
    if options.nanogpt is not None:
        read_definitions(NANOGPT, options.nanogpt)
    measure.check_counts(options, "repeats")
    measure.check_counts(options, "iterations", least=2)
    split = read_split(options.text, options.nanogpt)
    evaluate = partial(evaluate_whole, ids=encode(split))
    steps = options.iterations
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_ours(split, folder / "ours" / "prepared")
        sides = {OURS: partial(train_ours, folder / "ours", steps, itertools.count(SEED), evaluate)}
        if options.nanogpt is not None:
            prepare_theirs(options.nanogpt, split, folder / "theirs")
            sides[THEIRS] = partial(train_theirs, folder / "theirs", steps, evaluate)
        runs = measure.interleave(sides, options.repeats)
    settings = {"steps": steps, "repeats": options.repeats}
    if options.nanogpt is not None:
        settings[THEIRS] = fingerprint(options.nanogpt / NANOGPT.file)
    return measure.Report(
        title=f"Tiny shakespeare by characters, {steps:,} steps on the CPU: the whole process",
        headings=HEADINGS,
        rows=[table_row(name, runs) for name in runs],
        measured={
            name: [
                {**run._asdict(), "took": {"seconds": run.took.seconds, "cpu_seconds": run.took.cpu_seconds}}
                for run in each
            ]
            for name, each in runs.items()
        },
        settings=settings,
        notes=[
            f"validation loss: nats per character on all windows of {CONTEXT} of the last tenth of the text, "
            "taken after the clock has stopped; the mean over the repeats, of which ours have a seed each.",
            "overnight takes: the median share of the side's wall time, within each round.",
        ],
    )


def table_row(name: str, runs: dict[str, list[Training]]) -> list[str]:
    """One side's figures."""
    seconds = {side: [run.took.seconds for run in each] for side, each in runs.items()}
    losses = [run.loss for run in runs[name]]
    return [
        name,
        *measure.spread(seconds[name], digits=1),
        f"{statistics.median(run.took.cpu_seconds for run in runs[name]):.1f}",
        f"{statistics.median(run.step_milliseconds for run in runs[name]):.1f}",
        f"{statistics.mean(losses):.4f}",
        *(f"{loss:.4f}" for loss in (min(losses), max(losses))),
        f"{measure.paired_ratio(seconds[name], seconds[OURS]):.2f} of its time",
    ]


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=3, of="whole runs of each side")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without, only ours is trained")
    parser.add_argument("--text", type=Path, help="tiny shakespeare; what lies in the checkout if left out")
    parser.add_argument("--iterations", type=int, default=2000, help="steps; fewer make a quick try")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
