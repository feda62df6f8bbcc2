"""How long text takes to become shards, and how fast GPT-2's BPE encodes.

    python benchmarks/prepare.py --bpe FOLDER

The text is the documentation that comes with Python. FOLDER holds GPT-2's encoder.json and vocab.bpe;
without it only the preparation, which trains a BPE of its own, is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import measure
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.tokenize import tokenize_documents
from overnight.tokenizer.fast_byte_pair import accelerate
from overnight.tokenizer.tokenizer import Tokenizer
from text import load_bpe, python_texts

HEADINGS = ("what", "median ms", "min", "max", "MB/s", "times as fast")
REFERENCE = "encode, Hugging Face tokenizers"


def prepare_afresh(tokenizer: str) -> None:
    """Python's documentation into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_shards(PrepareConfig(source="python-docs", tokenizer=tokenizer, out=f"{folder}/prepared"))


def encoders(texts: Sequence[str], folder: Path) -> dict[str, Callable[[], NDArray[Any]]]:
    """Ways to encode the texts, each returning all ids end to end."""
    from tokenizers import ByteLevelBPETokenizer

    ours = load_bpe(folder)
    fast, problem = accelerate(ours)
    if problem:
        raise ValueError(problem)
    theirs = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))

    def encode_theirs() -> NDArray[Any]:
        return np.concatenate([np.array(found.ids, dtype=np.uint32) for found in theirs.encode_batch(texts)])

    sides: dict[str, Callable[[], NDArray[Any]]] = {
        f"encode, overnight by {name}, threads: {threads}": partial(encode_ours, tokenizer, texts, threads)
        for name, tokenizer in (("tiktoken", ours), ("fastokens", fast))
        for threads in sorted({1, os.cpu_count() or 1})
    }
    return {REFERENCE: encode_theirs, **sides}


def encode_ours(tokenizer: Tokenizer, texts: Sequence[str], threads: int) -> NDArray[Any]:
    """As `prepare_shards` does it, without the end-of-text ids that it puts before each document."""
    from overnight.preparation.documents import FilteredDocument

    documents = (FilteredDocument(text, "kept") for text in texts)
    ids = np.concatenate([batch.ids for batch in tokenize_documents(documents, tokenizer, threads)])
    return ids[ids != tokenizer.end_of_text]


def report(options: argparse.Namespace) -> measure.Report:
    """Prepare, then encode, each in turn."""
    texts = python_texts()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    title = f"prepare python-docs with {options.tokenizer}"
    times = measure.interleave_times({title: lambda: prepare_afresh(options.tokenizer)}, options.repeats)
    notes = []
    if options.bpe is not None:
        sides = encoders(texts, options.bpe)
        ids = {name: side() for name, side in sides.items()}  # the warm-up
        same = all(np.array_equal(found, ids[REFERENCE]) for found in ids.values())
        notes.append(f"All encoders {'gave the same ids' if same else 'DID NOT GIVE THE SAME IDS'}.")
        notes.append(f"Times as fast as {REFERENCE}.")
        times |= measure.interleave_times(sides, options.repeats)
    rows = [
        [
            name,
            *measure.spread(each),
            f"{megabytes / statistics.median(each) * 1e3:.1f}",
            f"{measure.paired_ratio(each, times[REFERENCE]):.2f}" if name != title else "",
        ]
        for name, each in times.items()
    ]
    return measure.Report(
        title=f"Text to ids: {megabytes:.2f} MB of Python's documentation",
        headings=HEADINGS,
        rows=rows,
        measured=times,
        settings={"repeats": options.repeats, "cores": os.cpu_count()},
        notes=notes,
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=3, of="measured repeats of each")
    parser.add_argument("--tokenizer", default="bpe-4096", help="what prepare trains")
    parser.add_argument("--bpe", type=Path, help="folder of GPT-2's encoder.json and vocab.bpe")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
