"""How long a corpus of Parquet files takes to become shards of GPT-2's tokens: whole processes, in turn.

    python benchmarks/corpus.py --corpus FOLDER --bpe gpt2-bpe --peer ../build-nanogpt --nanogpt ../nanoGPT

overnight's command with fastokens and without it, whose shards must be the same; beside them
build-nanogpt's fineweb.py and nanoGPT's data/openwebtext/prepare.py, which run as
they are, in a copy, but for three things: what they would download is read from FOLDER instead, GPT-2's
vocabulary from `--bpe`, and nanoGPT's writes its splits in one part instead of 1,024, since it fails where
a split has fewer documents. They need the package `datasets`; each has a cache of its own, at first empty.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
from checkouts import fingerprint

OURS, SLOWER = "overnight", "overnight, tiktoken"
FINEWEB, OPENWEBTEXT = "fineweb.py", "data/openwebtext/prepare.py"
HEADINGS = ("side", "median s", "min", "max", "CPU s", "MB/s", "M tokens/s", "overnight is", "peak GB")
PARTS = "total_batches = 1024\n"
# Where tiktoken fetches GPT-2's files from; by the hash of that it names them in its cache.
ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"

# Reads the corpus where the program asks for its own; the program is the second argument.
LAUNCHER = """
import runpy, sys
import datasets
real, files, program = datasets.load_dataset, sys.argv[1].split("|"), sys.argv[2]

def load_dataset(*_, split=None, num_proc=None, **__):
    read = real("parquet", data_files={"train": files}, columns=["text"], split=split)
    return read

datasets.load_dataset = load_dataset
sys.argv = [program]
runpy.run_path(program, run_name="__main__")
"""


def prepare_ours(
    files: Sequence[Path], bpe: Path, manifests: set[bytes], *, fast: bool
) -> tuple[measure.Finished, int]:
    """`overnight prepare` on a folder with these files, as one types it; and how many tokens it wrote.

    Adds what the manifest says of the shards to `manifests`. Unless `fast`, fastokens can't be imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, out, broken = Path(folder, "corpus"), Path(folder, "out"), Path(folder, "broken")
        source.mkdir()
        broken.mkdir()
        (broken / "fastokens.py").write_text("raise ImportError")
        before = (
            {} if fast else {"PYTHONPATH": os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])}
        )
        for file in files:
            (source / file.name).symlink_to(file.resolve())
        words = ["prepare", str(source), "--tokenizer", str(bpe), "--out", str(out)]
        done = measure.run_process(
            [*measure.overnight_command(), *words], environment={**os.environ, **before}
        )
        manifests.add((out / "manifest.json").read_bytes())
        return done, count_ours(out)


def count_ours(folder: Path) -> int:
    """Tokens in both splits."""
    from overnight.data.shards import SPLITS, read_manifest

    manifest = read_manifest(folder)
    return sum(manifest.tokens(split) for split in SPLITS)


def prepare_theirs(program: Path, files: Sequence[Path], bpe: Path) -> tuple[measure.Finished, int]:
    """A peer's program in a copy of its own folder; and how many tokens it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, program.name)
        copy.write_text(program.read_text(encoding="utf-8").replace(PARTS, "total_batches = 1\n"))
        cache = Path(folder, "tiktoken")
        cache.mkdir()
        for name in ("vocab.bpe", "encoder.json"):
            shutil.copy(bpe / name, cache / hashlib.sha1(f"{ADDRESS}/{name}".encode()).hexdigest())
        names = "|".join(str(file.resolve()) for file in files)
        caches = {"TIKTOKEN_CACHE_DIR": str(cache), "HF_HOME": str(Path(folder, "hf"))}
        environment = {**os.environ, **caches, "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, "-c", LAUNCHER, names, str(copy)]
        return measure.run_process(command, environment=environment), count_theirs(Path(folder))


def count_theirs(folder: Path) -> int:
    """Tokens in what a peer wrote: two bytes each, behind 128 bytes of header in an .npy file."""
    written = [(path.stat().st_size - 128) // 2 for path in folder.rglob("edufineweb_*.npy")]
    return sum(written) + sum(path.stat().st_size // 2 for path in folder.glob("*.bin"))


def report(options: argparse.Namespace) -> measure.Report:
    """All sides in turn."""
    files = sorted(options.corpus.glob("*.parquet"))[: options.files]
    if not files:
        raise ValueError(f"{options.corpus} holds no .parquet file")
    manifests: set[bytes] = set()
    ours = functools.partial(prepare_ours, files, options.bpe, manifests)
    sides = {OURS: functools.partial(ours, fast=True), SLOWER: functools.partial(ours, fast=False)}
    notes = []
    for checkout, name in ((options.peer, FINEWEB), (options.nanogpt, OPENWEBTEXT)):
        if checkout is None:
            continue
        program = checkout / name
        if not program.is_file():
            raise ValueError(f"there is no {name} in {checkout}; give the folder that holds one")
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"{name} needs the package datasets: pip install datasets")
        sides[name] = functools.partial(prepare_theirs, program, files, options.bpe)
        notes.append(f"{name}: {fingerprint(program)}, as it is; it chooses its processes itself.")
    took = measure.interleave(sides, options.repeats)
    if len(manifests) != 1:
        raise ValueError(f"{OURS} and {SLOWER} wrote different shards")
    megabytes = sum(text_bytes(file) for file in files) / 1e6
    seconds = {name: [finished.seconds for finished, _ in runs] for name, runs in took.items()}
    tokens = {name: runs[0][1] for name, runs in took.items()}
    rows = []
    for name, runs in took.items():
        median = statistics.median(seconds[name])
        cpu_seconds = statistics.median(finished.cpu_seconds for finished, _ in runs)
        rates = [f"{cpu_seconds:.1f}", f"{megabytes / median:.1f}", f"{tokens[name] / median / 1e6:.2f}"]
        ratio = measure.times_as_fast(seconds[OURS], seconds[name])
        peak = max(finished.peak_bytes for finished, _ in runs) / 1e9
        rows.append([name, *measure.spread(seconds[name], 1), *rates, ratio, f"{peak:.2f}"])
    written = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    notes.append(f"Tokens written: {written}. Peak: of the largest of a side's processes.")
    return measure.Report(
        title=f"{len(files)} Parquet files to GPT-2's tokens: {megabytes:,.0f} MB of text",
        headings=HEADINGS,
        rows=rows,
        measured={
            name: [
                {
                    "seconds": finished.seconds,
                    "cpu_seconds": finished.cpu_seconds,
                    "peak_bytes": finished.peak_bytes,
                    "tokens": count,
                }
                for finished, count in runs
            ]
            for name, runs in took.items()
        },
        settings={"repeats": options.repeats, "cores": os.cpu_count()},
        notes=notes,
    )


def text_bytes(file: Path) -> int:
    """Bytes of text in a Parquet file, before compression."""
    from overnight.data.text_files import TextFile
    from overnight.preparation.documents import divide_file

    return sum(divide_file(TextFile(str(file), file.name, file.stat().st_size), "text", 1 << 62).values())


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "peer nanogpt", repeats=3, of="whole runs of each side")
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of .parquet files with text")
    parser.add_argument("--bpe", type=Path, required=True, help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--files", type=int, help="only this number of files")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
