"""How fast shards become batches, whatever their size.

    python benchmarks/stream.py

Nothing but Python is needed: 10 million random ids stand for a small text, empty shards, which take no
place on the disk (sparse files), for a large one. nanoGPT's side is its way, written anew here: rows from
random places of a map of the file that is opened for each batch, ids and targets each read by themselves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import measure
from overnight.data.loader import TokenStream
from overnight.data.shards import HEADER_BYTES, SMALL, Manifest, Shard
from overnight.data.token_reader import ShardFile
from overnight.hardware import peak_memory_bytes, reset_peak_memory

HEADINGS = ("batches of", "median ms", "min", "max", "million tokens/s", "times as fast", "MB more")
SHARD_TOKENS = 100_000_000
VOCABULARY = 50_257


@dataclass(frozen=True)
class Unverified:
    """A folder of shards as a stream opens it, without the reading of all of it first."""

    folder: Path
    manifest: Manifest
    files: dict[str, ShardFile]

    def read(self, shard: Shard, first: int, into: NDArray[Any]) -> None:
        """Fill `into` with the tokens of a shard from index `first` on."""
        self.files[shard.name].read(first, into)

    def path(self, shard: Shard) -> Path:
        """Where it lies."""
        return self.folder / shard.name


def write_shards(folder: Path, tokens: int, *, shard_tokens: int, empty: bool) -> Unverified:
    """A folder of `tokens` tokens: random ids, or no more than the shards' headers and lengths."""
    folder.mkdir()
    shards = []
    for number, first in enumerate(range(0, tokens, shard_tokens)):
        size = min(shard_tokens, tokens - first)
        shards.append(Shard(name=f"train-{number:05}.bin", tokens=size, documents=1, text_bytes=0, sha256=""))
        header = np.zeros(256, dtype="<i4")
        header[:3] = SMALL.magic, SMALL.version, size
        with (folder / shards[-1].name).open("wb") as file:
            file.write(header.tobytes())
            if not empty:
                ids = np.random.default_rng(number).integers(0, VOCABULARY, size)
                file.write(ids.astype(SMALL.dtype).tobytes())
            file.truncate(HEADER_BYTES + size * SMALL.dtype.itemsize)
    facts = "source licence split_rule overnight_version tokenizer tokenizer_fingerprint"
    counts = "duplicate_documents empty_documents skipped_documents repaired_documents"
    manifest = Manifest(
        **dict.fromkeys(facts.split(), ""),
        **dict.fromkeys(counts.split(), 0),
        request={},
        documents=len(shards),
        vocab_size=VOCABULARY,
        end_of_text=VOCABULARY - 1,
        train=tuple(shards),
        validation=(),
    )
    return Unverified(folder, manifest, {shard.name: ShardFile(folder / shard.name) for shard in shards})


def draw_as_nanogpt(path: Path, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """A batch in nanoGPT's way, from a file of uint16 behind a shard's header."""
    tokens = np.memmap(path, dtype=SMALL.dtype, mode="r", offset=HEADER_BYTES)
    starts = torch.randint(len(tokens) - length, (rows,))
    ids, targets = (
        torch.stack(
            [
                torch.from_numpy(tokens[start + shift : start + shift + length].astype(np.int64))
                for start in starts
            ]
        )
        for shift in (0, 1)
    )
    return ids, targets


def read_on(stream: TokenStream, rows: int, numbers: Iterator[int]) -> Callable[[], tuple[Tensor, Tensor]]:
    """Each call gives the batch of the next number."""

    def read() -> tuple[Tensor, Tensor]:
        batch = stream.batch(next(numbers) * rows, rows)
        return batch.ids, batch.targets

    return read


def many(draw: Callable[[], object], batches: int) -> Callable[[], None]:
    """So many of them, one after the other."""

    def draw_all() -> None:
        for _ in range(batches):
            draw()

    return draw_all


def megabytes_more(action: Callable[[], None]) -> float:
    """By how much this process grows while it does something, at most."""
    reset_peak_memory("cpu")
    before = peak_memory_bytes("cpu") or 0
    action()
    return ((peak_memory_bytes("cpu") or 0) - before) / 1e6


def report(options: argparse.Namespace) -> measure.Report:
    """Draw batches in turn."""
    torch.set_num_threads(1)  # the stream's own work is one thread's, and so is nanoGPT's
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> measure.Report:
    """The report, on files written below `folder`."""
    rows, length = options.rows, options.context
    reference = f"nanoGPT's get_batch, {options.small:,} tokens"
    draws: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        reference: lambda: draw_as_nanogpt(folder / str(options.small) / "train-00000.bin", rows, length)
    }
    for tokens in (options.small, options.large):
        empty = tokens != options.small
        shard_tokens = min(SHARD_TOKENS, tokens)
        shelf = write_shards(folder / str(tokens), tokens, shard_tokens=shard_tokens, empty=empty)
        stream = TokenStream(shelf, tokens_per_row=length)
        draws[f"overnight, {tokens:,} tokens"] = read_on(stream, rows, count())
    again = cycle(range(options.batches))
    draws[f"overnight, {options.large:,} tokens, the same rows again"] = read_on(stream, rows, again)
    sides = {name: many(draw, options.batches) for name, draw in draws.items()}
    times = measure.interleave_times(sides, options.repeats, warm_ups=1)
    grown = {name: megabytes_more(side) for name, side in sides.items()}
    small, *others = list(times.values())[1:]
    new, same = (measure.paired_ratio(small, each) for each in others)
    tokens = options.batches * rows * length
    table = [
        [
            name,
            *measure.spread([milliseconds / options.batches for milliseconds in each], 4),
            f"{tokens / statistics.median(each) / 1e3:,.0f}",
            f"{measure.paired_ratio(each, times[reference]):.1f}",
            f"{grown[name]:.1f}",
        ]
        for name, each in times.items()
    ]
    notes = [
        f"Rows of the large text take {same:.2f} times as long as rows of the small "
        f"one where the operating system has them in memory, as it has all of the small text, and "
        f"{new:.2f} times as long where it has to find memory for them first.",
        f"MB more: how far the process grew over {options.batches} batches.",
    ]
    return measure.Report(
        title="Shards to batches, on one thread",
        headings=HEADINGS,
        rows=table,
        measured={"milliseconds": times, "megabytes_more": grown},
        settings={"rows": rows, "context": length, "batches": options.batches, "repeats": options.repeats},
        notes=notes,
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=15, of="measured repeats of each")
    parser.add_argument("--rows", type=int, default=12, help="of a batch; nanoGPT's own are 12")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--small", type=int, default=10_000_000, help="tokens of the small text")
    parser.add_argument("--large", type=int, default=10_000_000_000, help="tokens of the large text")
    parser.add_argument("--batches", type=int, default=400, help="drawn in each repeat")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
