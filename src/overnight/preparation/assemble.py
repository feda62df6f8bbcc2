"""Tokenized units to shards: the status of every document, the layout of the shards, and the manifest.

First the layout is decided, from a few bytes per document; then any worker can write any shard.
Nothing here depends on the number of workers.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overnight import __version__
from overnight.data.shards import SPLITS, Manifest, Shard, TokenFile, Tokens
from overnight.files import write_atomically
from overnight.preparation.decontaminate import benchmark_names
from overnight.preparation.dedup import BUCKETS, find_duplicates, find_near_duplicates
from overnight.preparation.documents import (
    KEPT,
    RECORD,
    STATUSES,
    DocumentStatus,
    Records,
    is_validation,
    kept_mask,
)
from overnight.preparation.prepare_config import MOST_SHARDS
from overnight.preparation.prepare_state import (
    PrepareState,
    must_tokenize_again,
    open_tokenizer,
    read_state,
    target_units,
)
from overnight.preparation.tokenize import read_bucket, read_records, tokenize_units, unit_path

NOT_WANTED = len(STATUSES)  # status of a document after the last one that `tokens` needs
NO_SPLIT = len(SPLITS)  # in the place of the split's index for a document that is left out


@dataclass(frozen=True)
class ShardLayout:
    """Where the tokens of each unit lie in the two splits."""

    shard_tokens: int
    starts: dict[str, list[int]]
    """Split -> the position of each unit's first token; the last entry is the number of tokens."""
    first_documents: list[int]
    """The index of each unit's first document; the last entry is the number of documents."""
    documents: dict[DocumentStatus, int]
    """Number of documents of each status, without those beyond `tokens`."""
    damaged_files: int
    contaminated: dict[str, int]
    """Benchmark -> number of documents, duplicates excluded, that share a passage with it."""

    @property
    def kept_documents(self) -> int:
        """Number of documents in the shards."""
        return sum(self.documents.get(status, 0) for status in KEPT)

    @property
    def tokens(self) -> int:
        """Number of tokens of both splits."""
        return sum(self.starts[split][-1] for split in SPLITS)

    def shards(self, split: str, *, only_full: bool = False) -> range:
        """The indices of the shards of a split; further documents do not change those that are full."""
        full, rest = divmod(self.starts[split][-1], self.shard_tokens)
        return range(full + (rest > 0 and not only_full))


def decide_layout(staging: Path, state: PrepareState, units: int) -> ShardLayout:
    """Decide the status and the split of every document of the first `units` units, and where its tokens lie.

    Writes the splits and the layout into the staging folder. Raises ValueError if there are too many shards.
    """
    files = [unit_path(staging, number).with_suffix(".documents") for number in range(units)]
    first_documents = [0, *itertools.accumulate(file.stat().st_size // RECORD.itemsize for file in files)]
    records = np.empty(first_documents[-1], dtype=RECORD)
    damaged_files = {*state.damaged_files}
    for number, (begin, end) in enumerate(itertools.pairwise(first_documents)):
        records[begin:end] = read_records(staging, number)
        damaged_files |= {*json.loads(files[number].with_suffix(".json").read_text(encoding="utf-8"))}
    status = _decide_status(staging, state, records, units)
    splits = np.where(kept_mask(status), is_validation(records, state.validation_fraction), NO_SPLIT)
    np.save(staging / "splits.npy", splits.astype(np.uint8))
    starts = {}
    for code, split in enumerate(SPLITS):
        ends = np.cumsum(np.where(splits == code, records["tokens"], 0), dtype=np.int64)
        starts[split] = np.concatenate([[0], ends])[first_documents].tolist()
    counts = np.bincount(status, minlength=NOT_WANTED + 1).tolist()
    found = records["shared"][kept_mask(status) | (status == STATUSES.index("contaminated"))]
    benchmarks = enumerate(benchmark_names(state.config.benchmark_paths))
    layout = ShardLayout(
        shard_tokens=state.config.shard_tokens,
        starts=starts,
        first_documents=first_documents,
        documents={name: count for name, count in zip(STATUSES, counts, strict=False) if count},
        damaged_files=len(damaged_files),
        contaminated={name: int(np.count_nonzero(found & np.uint64(1 << bit))) for bit, name in benchmarks},
    )
    for split in SPLITS:
        if (shards := len(layout.shards(split))) > MOST_SHARDS:
            tokens = starts[split][-1]
            raise ValueError(
                f"{tokens:,} tokens make {shards:,} shards, more than {MOST_SHARDS:,}: "
                f"give --shard-tokens {-(-tokens // MOST_SHARDS)} or more"
            )
    write_atomically(staging / "layout.json", json.dumps(asdict(layout)) + "\n")
    return layout


def _decide_status(staging: Path, state: PrepareState, records: Records, units: int) -> NDArray[np.uint8]:
    """(documents,): the status codes of all documents."""
    status: NDArray[np.uint8] = records["status"].copy()
    status[find_duplicates(records)] = STATUSES.index("duplicate")
    if state.config.on_contaminated == "drop":
        status[(records["shared"] > 0) & kept_mask(status)] = STATUSES.index("contaminated")
    if state.config.near_duplicates == "drop":
        buckets = (read_bucket(staging, units, bucket) for bucket in range(BUCKETS))
        status[find_near_duplicates(buckets, status)] = STATUSES.index("near-duplicate")
    if state.config.tokens is not None:
        kept_tokens = np.where(kept_mask(status), records["tokens"], 0).astype(np.int64)
        status[np.cumsum(kept_tokens) - kept_tokens >= state.config.tokens] = NOT_WANTED
    return status


def require_documents(state: PrepareState, layout: ShardLayout) -> None:
    """Raise ValueError if a split has no document."""
    if layout.kept_documents == 0 and layout.documents.get("contaminated"):
        raise ValueError(f"every document of {state.source} shares a passage with a benchmark")
    if layout.kept_documents == 0:
        raise ValueError(f"{state.source} holds no text")
    for split in SPLITS:
        if layout.starts[split][-1] == 0:
            direction = "raise" if split == "validation" else "lower"
            raise ValueError(
                f"none of the {layout.kept_documents:,} documents of {state.source} is in the {split} split, "
                f"which is chosen by their hash: {direction} --validation-fraction, or give more text"
            )


def decide_shards(staging: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """Slurm's step that decides the layout. Raises ValueError if a split has no document."""
    state = read_state(staging)
    if must_tokenize_again(staging):
        tokenize_units(staging)
    require_documents(state, decide_layout(staging, state, target_units(staging)))


def write_shards(staging: Path, rank: int = 0, ranks: int = 1, *, only_full: bool = False) -> None:
    """Write every `ranks`-th shard of both splits."""
    assembler = ShardAssembler(staging)
    shards = [(split, n) for split in SPLITS for n in assembler.layout.shards(split, only_full=only_full)]
    for split, index in shards[rank::ranks]:
        assembler.write(split, index)


class ShardAssembler:
    """Writes shards from the tokenized units of a staging folder whose layout is decided."""

    def __init__(self, staging: Path) -> None:
        self.staging, self.state = staging, read_state(staging)
        self.layout = ShardLayout(**json.loads((staging / "layout.json").read_text(encoding="utf-8")))
        self.tokenizer = open_tokenizer(staging)
        self._splits = np.load(staging / "splits.npy", mmap_mode="r")

    def write(self, split: str, index: int) -> Shard:
        """Write one shard, unless it is there already."""
        name, size = f"{split}-{index:05d}", self.layout.shard_tokens
        record = self.staging / f"{name}.json"
        if record.is_file():
            return Shard(**json.loads(record.read_text(encoding="utf-8")))
        end = min((index + 1) * size, self.layout.starts[split][-1])
        shard = self._write_tokens(f"{name}.bin", split, index * size, end)
        write_atomically(record, json.dumps(asdict(shard)) + "\n")
        return shard

    def write_split(self, split: str, *, only_full: bool = False) -> tuple[Shard, ...]:
        """Write the shards of a split that are not there yet; returns all of them."""
        return tuple(self.write(split, index) for index in self.layout.shards(split, only_full=only_full))

    def write_unfinished(self, split: str) -> tuple[Shard, ...]:
        """Write the tokens of the shard that is not complete yet: one shard, or none."""
        end = self.layout.starts[split][-1]
        index, rest = divmod(end, self.layout.shard_tokens)
        name = f"{split}-{index:05d}-{rest}.bin"
        return (self._write_tokens(name, split, end - rest, end),) if rest else ()

    def manifest(self, shards: dict[str, tuple[Shard, ...]]) -> Manifest:
        """The manifest of a prepared folder that holds these shards."""
        state, layout, tokenizer = self.state, self.layout, self.tokenizer
        return Manifest(
            overnight_version=__version__,
            source=state.source,
            licence=state.licence,
            request=state.request,
            split_rule="validation if the first 8 bytes of the text's blake2b-128 are below "
            f"{state.validation_fraction} of 2^64",
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            documents=layout.kept_documents,
            files_read=state.files_read,
            files_left_alone=state.files_left_alone,
            duplicate_documents=layout.documents.get("duplicate", 0),
            empty_documents=layout.documents.get("empty", 0),
            skipped_documents=layout.documents.get("skipped", 0),
            repaired_documents=layout.documents.get("repaired", 0),
            near_duplicate_documents=layout.documents.get("near-duplicate", 0),
            damaged_files=layout.damaged_files,
            contaminated_documents=layout.contaminated,
            train=shards["train"],
            validation=shards["validation"],
        )

    def _write_tokens(self, name: str, split: str, begin: int, end: int) -> Shard:
        """A shard of the tokens of a split from `begin` to before `end`."""
        file = TokenFile(self.staging / name, self.tokenizer.vocab_size)
        documents = text_bytes = 0
        try:
            for number, (first, after) in enumerate(itertools.pairwise(self.layout.starts[split])):
                if not (begin < after and first < end and first < after):
                    continue
                records, ids = self._read_unit(split, number, file.format.dtype)
                file.append(ids[max(0, begin - first) : end - first])
                starts = first + np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
                begun = records[(starts >= begin) & (starts < end)]
                documents += begun.size
                text_bytes += int(begun["bytes"].sum())
            return Shard(
                name=name, tokens=file.tokens, documents=documents, text_bytes=text_bytes, sha256=file.close()
            )
        finally:
            file.abandon()

    def _read_unit(self, split: str, number: int, dtype: np.dtype[Any]) -> tuple[Records, Tokens]:
        """The records of a unit's documents in one split, and their ids, end to end."""
        records = read_records(self.staging, number)
        first = self.layout.first_documents[number]
        chosen = self._splits[first : first + records.size] == SPLITS.index(split)
        ids = np.asarray(np.memmap(unit_path(self.staging, number).with_suffix(".ids"), dtype, mode="r"))
        begins = np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)])
        runs = np.flatnonzero(np.diff(chosen, prepend=False, append=False))  # of documents: first, end, ...
        spans = [ids[begin:end] for begin, end in begins[runs].reshape(-1, 2)]
        return records[chosen], np.concatenate(spans)
