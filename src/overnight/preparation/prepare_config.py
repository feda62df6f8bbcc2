"""The options of `prepare`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from overnight.config import field_types
from overnight.data import BENCHMARK_KINDS
from overnight.preparation.sources import source_name

MOST_TOKENS = 2**31 - 1  # a shard's header counts in an int32
MOST_SHARDS = 100_000
POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
NO_SOURCE = "name a source (python-docs, shakespeare, a file, a folder), or give from_shards"
IMPORT_OPTIONS = frozenset({"from_shards", "out", "tokenizer", "shard_tokens"})


def parse_count(text: str) -> int:
    """1000, 500K, 10M, 1B, 1.3T as a whole number. Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)", text.strip().replace("_", ""), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a count: write 1000000, 500K, 10M, 1B or 1.3T")
    return round(Decimal(found[1]).scaleb(POWERS[found[2].upper()]))


def _count_option(*, optional: bool) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda words: None if optional and words == ["None"] else parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The text to prepare, and how it becomes shards.

    A document is a line of .jsonl, an item of a .json array, a row of .parquet, or a text file; a text file
    of more than 20,000 bytes is cut at blank lines into documents of about 10,000.
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = None
    """python-docs, shakespeare, fineweb-edu, openwebtext; a file or folder of .txt, .md, .jsonl, .json (.gz,
    .zst) or .parquet; hf://datasets/OWNER/NAME, s3://BUCKET/FOLDER."""
    from_shards: str | None = None
    """Instead of a source: a folder of llm.c's or modded-nanogpt's .bin, build-nanogpt's .npy, or nanoGPT's
    train.bin and val.bin. Goes to data/<folder>-adopted; only --out, --tokenizer, --shard-tokens apply."""
    out: str | None = None
    """Where the shards go; data/<source> if left out, or data/<source>-<tokenizer> if that is not gpt2."""
    subset: str | None = None
    """The subset of fineweb-edu: sample-10BT (the default), sample-100BT, sample-350BT, default."""
    tokenizer: str = "gpt2"
    """gpt2, characters, bpe-N (trained on the training documents: N ids), or the path of a tokenizer."""
    train_tokenizer: int | None = None
    """Train a BPE of N ids on the training documents: the same as --tokenizer bpe-N."""
    validation_fraction: float | None = None
    """Share of the documents held out, chosen by their hash; if left out, 0.1 for python-docs and
    shakespeare, else 0.01, or what holds out 100 KB of a smaller text, at most 0.2."""
    text_column: str = "text"
    """The column of JSON and Parquet files that holds the text; data.text is a field of the field data."""
    on_bad_text: Literal["fail", "replace", "skip"] = "fail"
    """Text that is not UTF-8: stop, replace invalid bytes by U+FFFD, or leave the document out."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """A compressed or Parquet file that is truncated or damaged: stop, or leave it out."""
    from_file: str | None = None
    """Your own copy of the file to download, for a machine without a network."""
    decontaminate: tuple[str, ...] = ()
    """Files of benchmarks (.jsonl, .txt, .tokens; separated by spaces or commas): count the documents that
    share 13 words in a row with one."""
    on_contaminated: Literal["report", "drop"] = "report"
    """Documents that share a passage with a benchmark: keep and count them, or leave them out."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Documents that differ in a few words (MinHash): keep all, or only the first of each cluster."""
    tokens: Annotated[int | None, _count_option(optional=True)] = None
    """Stop after the document with which both splits together have this many tokens (500M, 10B); all if left
    out."""
    shard_tokens: Annotated[int, _count_option(optional=False)] = 100_000_000
    """Tokens per shard."""
    workers: int | None = None
    """Number of workers; one per core if left out. The shards do not depend on it."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where the workers run: on this machine, on a Ray cluster, or in an array of Slurm jobs."""
    tasks: int | None = None
    """Number of Slurm or Ray jobs; 10 if left out."""
    slurm_partition: str | None = None
    """The partition that sbatch submits to."""
    slurm_time: str = "04:00:00"
    """Each job's time limit."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        if self.validation_fraction is not None and not 0.0 < self.validation_fraction < 1.0:
            found.append(f"validation_fraction={self.validation_fraction} must be between 0 and 1")
        for name, kind in field_types(PrepareConfig).items():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if choices and getattr(self, name) not in choices:
                found.append(f"{name}={getattr(self, name)!r} must be {' or '.join(choices)}")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            found.append(f"shard_tokens={self.shard_tokens} must be between 1 and {MOST_TOKENS:,}")
        for name in ("tokens", "workers", "tasks"):
            if (count := getattr(self, name)) is not None and count < 1:
                found.append(f"{name}={count} must be at least 1, or left out")
        for path in self.benchmark_paths:
            if not path.lower().endswith(BENCHMARK_KINDS) or not Path(path).is_file():
                kinds = ", ".join(BENCHMARK_KINDS)
                found.append(f"decontaminate: {path} is not a {kinds} file; benchmarks are not downloaded")
        return found + self._conflicts()

    def _conflicts(self) -> list[str]:
        """Settings that can't be used together, and settings without a required one."""
        found = []
        if self.on_contaminated == "drop" and not self.benchmark_paths:
            found.append("on_contaminated=drop needs decontaminate: the benchmarks' files")
        if self.train_tokenizer is not None and self.tokenizer != "gpt2":
            found.append(f"give only one of train_tokenizer and tokenizer={self.tokenizer}")
        if self.executor == "slurm" and self.slurm_partition is None:
            found.append("executor=slurm needs slurm_partition: the partition that sbatch submits to")
        if self.executor == "local" and self.tasks is not None:
            found.append("tasks is for executor=slurm and executor=ray; on this machine, give workers")
        if self.source is None and self.from_shards is None:
            found.append(NO_SOURCE)
        for field in fields(self) if self.from_shards is not None else ():
            if field.name not in IMPORT_OPTIONS and getattr(self, field.name) != field.default:
                found.append(f"{field.name} can't be used with from_shards, which does not change the shards")
        return found

    @property
    def benchmark_paths(self) -> tuple[str, ...]:
        """The benchmark files, given as several words or separated by commas."""
        return tuple(path.strip() for word in self.decontaminate for path in word.split(",") if path.strip())

    @property
    def tokenizer_name(self) -> str:
        """gpt2, characters, bpe-N or a path, from either option."""
        return self.tokenizer if self.train_tokenizer is None else f"bpe-{self.train_tokenizer}"


def output_folder(config: PrepareConfig) -> Path:
    """The folder that `prepare(config)` fills. Raises ValueError if the source does not exist."""
    if config.from_shards is not None:
        if not Path(config.from_shards).is_dir():
            raise ValueError(f"from_shards: the folder {config.from_shards} does not exist")
        name = f"{Path(config.from_shards).resolve().name}-adopted"
    elif config.source is None:
        raise ValueError(NO_SOURCE)
    else:
        name = source_name(config.source, config.subset)
    if config.out is not None:
        return Path(config.out)
    tokenizer = config.tokenizer_name
    return Path("data", name if tokenizer == "gpt2" else f"{name}-{Path(tokenizer).stem}")
