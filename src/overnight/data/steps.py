"""The steps of a preparation. Each is a function (place, rank, ranks) that does every `ranks`-th item.

Whoever does them, in one process or on a cluster, leaves out what is done already; the folder `place` is all
that the ranks share.
"""

from __future__ import annotations

from pathlib import Path

from overnight import __version__
from overnight.data.assemble import Layout, decide, read_layout, write_beginning, write_shard
from overnight.data.encode import encode_unit
from overnight.data.output import appear, shown_folder
from overnight.data.request import MOST_SHARDS
from overnight.data.selection import KEPT
from overnight.data.shards import SO_FAR, SPLITS, Manifest, Shard, read_manifest, write_manifest
from overnight.data.work import is_complete, open_tokenizer, read_work, remove_traces, wanted_units
from overnight.run_directory import flush_folder

TOKENS_OF_WRITER = 1_000_000_000  # that one process puts together: some seconds


def encode(place: Path, rank: int = 0, ranks: int = 1, threads: int = 1) -> None:
    """Every `ranks`-th unit to ids."""
    for number in range(rank, wanted_units(place), ranks):
        encode_unit(place, number, threads)


def decide_all(place: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """What becomes of each document, and which shards there will be. Raises ValueError if nothing is left."""
    layout, work = decide_so_far(place), read_work(place)
    documents = sum(layout.fates.get(fate, 0) for fate in KEPT)
    if documents == 0 and layout.fates.get("contaminated"):
        raise ValueError(f"every document of {work.source} shares a passage with a benchmark")
    if documents == 0:
        raise ValueError(f"{work.source} holds no text")
    for split in SPLITS:
        if layout.starts[split][-1] == 0:
            direction = "raise" if split == "validation" else "lower"
            raise ValueError(
                f"none of the {documents:,} documents of {work.source} fell to {split}, "
                f"which goes by their hash: {direction} --validation-fraction, or give more text"
            )


def decide_so_far(place: Path) -> Layout:
    """What becomes of each document that is encoded. Raises ValueError if there are too many shards."""
    layout, work = decide(place), read_work(place)
    for split in SPLITS:
        if (shards := layout.shards(split, work.shard_tokens)) > MOST_SHARDS:
            tokens = layout.starts[split][-1]
            raise ValueError(
                f"{tokens:,} tokens make {shards:,} shards, more than {MOST_SHARDS:,}: "
                f"give --shard-tokens {-(-tokens // MOST_SHARDS)} or more"
            )
    return layout


def count_writers(place: Path) -> int:
    """Among how many the writing of shards is worth dividing."""
    tokens = sum(read_layout(place).starts[split][-1] for split in SPLITS)
    return max(1, -(-tokens // TOKENS_OF_WRITER))


def write_shards(place: Path, rank: int = 0, ranks: int = 1) -> None:
    """Every `ranks`-th shard of both splits."""
    layout, tokens = read_layout(place), read_work(place).shard_tokens
    all_shards = [(split, index) for split in SPLITS for index in range(layout.shards(split, tokens))]
    for split, index in all_shards[rank::ranks]:
        write_shard(place, split, index)


def write_complete_shards(place: Path, rank: int = 0, ranks: int = 1) -> None:
    """Every `ranks`-th shard, but for the last of each split, which is to grow."""
    layout, tokens = read_layout(place), read_work(place).shard_tokens
    complete = [(split, index) for split in SPLITS for index in _complete(layout, split, tokens)]
    for split, index in complete[rank::ranks]:
        write_shard(place, split, index)


def publish(place: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """The last of Slurm's jobs: the manifest, and the folder's own name."""
    finish(place)
    appear(shown_folder(place))


def finish(place: Path) -> Manifest:
    """Write the manifest, and remove what only the work needed; goes on where it was killed."""
    if not is_complete(place):
        write_manifest(place, _describe_all(place))
    manifest = read_manifest(place)
    remove_traces(place, {shard.name for split in SPLITS for shard in manifest.shards(split)})
    flush_folder(place)
    return manifest


def _describe_all(place: Path) -> Manifest:
    layout, tokens = read_layout(place), read_work(place).shard_tokens
    shards = {
        split: tuple(write_shard(place, split, index) for index in range(layout.shards(split, tokens)))
        for split in SPLITS
    }
    return _describe(place, layout, shards)


def show_so_far(place: Path) -> None:
    """Say which shards are complete; of the held-out text, show the beginning even where it fills none."""
    layout, tokens = read_layout(place), read_work(place).shard_tokens
    shards = {
        split: tuple(write_shard(place, split, index) for index in _complete(layout, split, tokens))
        for split in SPLITS
    }
    shards["validation"] += tuple(write_beginning(place, "validation"))
    write_manifest(place, _describe(place, layout, shards), SO_FAR)


def _complete(layout: Layout, split: str, shard_tokens: int) -> range:
    """The shards of a split that nothing can change any more."""
    return range(layout.starts[split][-1] // shard_tokens)


def _describe(place: Path, layout: Layout, shards: dict[str, tuple[Shard, ...]]) -> Manifest:
    work, tokenizer, fates = read_work(place), open_tokenizer(place), layout.fates
    return Manifest(
        overnight_version=__version__,
        source=work.source,
        licence=work.licence,
        request=work.request,
        split_rule="validation if the first 8 bytes of the text's blake2b-128 are below "
        f"{work.validation_fraction} of 2^64",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        documents=sum(fates.get(fate, 0) for fate in KEPT),
        duplicate_documents=fates.get("duplicate", 0),
        empty_documents=fates.get("empty", 0),
        skipped_documents=fates.get("skipped", 0),
        repaired_documents=fates.get("repaired", 0),
        damaged_files=layout.damaged_files,
        near_duplicate_documents=fates.get("near-duplicate", 0),
        contaminated_documents=layout.contaminated,
        train=shards["train"],
        validation=shards["validation"],
    )
