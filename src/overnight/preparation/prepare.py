"""Documents to shards: what is left out, which side a document is on, its ids, and the manifest at the end.

    source -> units -> ids of each unit -> what becomes of each document -> shards -> manifest

Units are encoded by whoever has time, then all is decided from a few bytes a document, then the shards are
written by whoever has time. So memory stays flat, any of it may be killed and goes on where it was, and the
result is the same, byte for byte, for any number of workers on any number of machines. It appears under its
name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from overnight import __version__
from overnight.config import raise_problems
from overnight.data import DataConfig
from overnight.data.atomic_folder import (
    exclusive,
    plain_file_errors,
    publish_folder,
    published_path,
    require_disk_space,
    staging_folder,
    staging_path,
)
from overnight.data.remote import is_prepared_elsewhere
from overnight.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    SHARD_NAME,
    SO_FAR,
    SPLITS,
    Manifest,
    Shard,
    read_manifest,
    token_format,
    verify,
    write_manifest,
)
from overnight.data.text_files import DamagedFileError
from overnight.preparation.assemble import (
    ShardLayout,
    decide_layout,
    read_layout,
    write_first_shards,
    write_shard,
)
from overnight.preparation.decontaminate import benchmark_names, build_index, describe_benchmarks, save_index
from overnight.preparation.dedup import compare_units, comparing_steps, forget_clusters, require_datatrove
from overnight.preparation.documents import (
    KEPT,
    Part,
    divide_file,
    document_hash,
    estimate_text_bytes,
    filter_documents,
    split_of,
)
from overnight.preparation.executors import JOBS, count_threads, is_at_work, run_step, submit_to_slurm
from overnight.preparation.import_shards import plan_import
from overnight.preparation.prepare_config import MOST_SHARDS, PrepareConfig, output_folder
from overnight.preparation.prepare_state import (
    SLURM_JOB,
    PrepareState,
    Request,
    group_parts,
    is_begun,
    is_complete,
    open_tokenizer,
    read_state,
    remove_traces,
    request_units,
    target_units,
    write_state,
)
from overnight.preparation.sources import Source, open_source
from overnight.preparation.tokenize import (
    count_encoded,
    documents_in_order,
    tokenize_documents,
    tokenize_unit,
)
from overnight.run_directory import flush_folder, write_atomically
from overnight.terminal import echo, progress
from overnight.tokenizer.open_tokenizer import NAMES, build_tokenizer, load_tokenizer

__all__ = ["PrepareConfig", "ensure_prepared", "output_folder", "prepare", "training_texts"]

UNIT_BYTES = 16_000_000  # of text: a second of one core
MOST_UNITS = 10_000  # so that a terabyte does not become as many files
TRAINING_BYTES = 1_000_000_000  # that a tokenizer is trained on, at most
EARLY_BYTES = 1_000_000_000  # of text, after which the first shards are shown: a minute of two cores
SAMPLED_DOCUMENTS = 64
BYTES_PER_TOKEN_AT_MOST = 6  # of English in GPT-2's tokens it is 4.5


def prepare(config: PrepareConfig) -> Manifest | None:
    """Fill `output_folder(config)` with shards, or verify and reuse it if the same request filled it before.

    None if the work was handed to Slurm, and is not done yet. Raises ValueError for a request that can't
    be met: nothing is there under the folder's name then.
    """
    raise_problems(config.problems(), "prepare")
    folder = output_folder(config)
    with plain_file_errors(folder):
        request, fill = _plan(config)
        existing = _find_prepared(folder, request)  # needs no lock: a folder appears whole
        if existing is None:
            with exclusive(folder):
                existing = _find_prepared(folder, request)  # by another process, while this one waited
                if existing is None:
                    return fill(folder)
    echo(f"{folder} holds this already, and it is sound")
    return existing


def ensure_prepared(config: DataConfig) -> DataConfig:
    """Prepare each text of `config` that is not prepared yet; returns `config` with the prepared folders.

    With `shuffle_window`, a folder that is still being prepared is returned as it is. Raises ValueError for a
    folder that is incomplete and can't be used yet, and for shards without a manifest.
    """
    if not config.mixture:
        return dataclasses.replace(config, data=_ensure_text(config.data, config))
    mixture = tuple(
        dataclasses.replace(source, path=_ensure_text(source.path, config)) for source in config.mixture
    )
    return dataclasses.replace(config, mixture=mixture)


def _ensure_text(path: str, config: DataConfig) -> str:
    """The folder or URL of the shards of one text, prepared first if it is not yet."""
    if is_prepared_elsewhere(path):
        return path
    request = PrepareConfig(
        source=path, tokenizer=config.tokenizer, validation_fraction=config.validation_fraction
    )
    is_shards = (Path(path) / MANIFEST).is_file() or _is_in_progress(Path(path))
    folder = Path(path) if is_shards else output_folder(request)
    if (folder / MANIFEST).is_file() or (config.shuffle_window is not None and _is_in_progress(folder)):
        return str(folder)
    if is_shards:
        raise ValueError(
            f"{folder} is not prepared to its end: wait until it is, or give the command that began it once "
            "more; with --shuffle-window 100_000_000, training begins with what is complete"
        )
    if any(SHARD_NAME.fullmatch(file.name) for file in Path(path).glob("*.bin")):
        raise ValueError(
            f"{path} holds shards and no {MANIFEST} that vouches for them: bring it back from a "
            "copy, or prepare the text again into another folder"
        )
    if prepare(request) is None:
        raise ValueError(f"{folder} is being prepared by Slurm's jobs: wait until they are done")
    return str(folder)


def _is_in_progress(folder: Path) -> bool:
    """True if a preparation of the folder was begun and is not complete; it may have been interrupted."""
    return not (folder / MANIFEST).is_file() and staging_path(folder).is_dir()


def _plan(config: PrepareConfig) -> tuple[Request, Callable[[Path], Manifest | None]]:
    """What decides the content of the folder, and the function that fills it."""
    if config.from_shards is not None:
        return plan_import(config)
    assert config.source is not None  # `problems` asks for it
    source = open_source(config.source, config.subset, config.from_file)
    request = _request(config, source)
    return request, lambda folder: _fill(folder, _plan_work(config, source, request), config)


def _fill(folder: Path, work: PrepareState, config: PrepareConfig) -> Manifest | None:
    """Do all the work, or what is left of it."""
    if work.near_duplicates == "drop":
        require_datatrove()
    with staging_folder(folder, lambda place: is_begun(place, work)) as place:
        if _is_with_slurm(place):
            return None
        is_filled = is_complete(place) or _fill_place(place, work, config)
        if not is_filled:
            return None
        manifest = finish(place)
    publish_folder(folder)
    return manifest


def _fill_place(place: Path, work: PrepareState, config: PrepareConfig) -> bool:
    """Everything but the manifest; False if it was handed to Slurm."""
    enough = work.units_for(float("inf") if work.tokens is None else work.tokens * BYTES_PER_TOKEN_AT_MOST)
    if not is_begun(place, work):
        (place / "units").mkdir()
        request_units(place, min(enough, work.units_for(EARLY_BYTES)) if _shows_early(config) else enough)
        write_state(place, work)
    if work.benchmarks and not (place / "benchmarks").is_dir():
        save_index(place, build_index(benchmark_names(config.benchmark_paths)))
    if not (place / "tokenizer").is_dir():
        _build_tokenizer(place, work, config.tokenizer_name)
        require_disk_space(place, _estimate_bytes(place, work))
    if config.executor == "slurm":
        _hand_to_slurm(place, config)
        return False
    _encode_here(place, config, enough)
    while _is_short(place):
        forget_clusters(place)
        enough = min(len(work.units), 2 * target_units(place))
        _encode_here(place, config, enough)
    decide_all(place)
    run_step(write_shards, place, count_writers(place), config)
    return True


def _shows_early(config: PrepareConfig) -> bool:
    """True if shards are shown as soon as they are complete.

    Which documents are near-duplicates is known only at the end; on a cluster, each pause costs a start.
    """
    return config.executor == "local" and config.near_duplicates == "keep"


def _encode_here(place: Path, config: PrepareConfig, enough: int) -> None:
    """Encode so many units, those that are not there yet, with a bar; find near-duplicates if asked to.

    Wave by wave, each as large as all before it together, and after each but the last, shards are shown.
    """
    work = read_state(place)
    with progress("encoding", sum(work.unit_bytes[:enough]) / 1e6, "MB") as advance:
        watch = _watch_encoding(place, work, advance)
        while True:
            units = target_units(place)
            run_step(
                partial(tokenize_units, threads=count_threads(config, units)), place, units, config, watch
            )
            if units >= enough:
                break
            if _shows_early(config):
                _show_early(place, config)
            request_units(place, min(enough, 2 * units))
    if work.near_duplicates == "drop":
        compare_units(place, config)


def _show_early(place: Path, config: PrepareConfig) -> None:
    """Write the shards that are complete, and say so to whoever wants to train on them."""
    decide_so_far(place)
    run_step(write_complete_shards, place, count_writers(place), config)
    show_so_far(place)


def _watch_encoding(place: Path, work: PrepareState, advance: Callable[..., None]) -> Callable[[], None]:
    """A function that moves the bar to where the work is."""
    shown, started_at = 0.0, time.perf_counter()
    before = count_encoded(place, work.unit_bytes)[1]  # by an earlier run that was interrupted

    def watch() -> None:
        nonlocal shown
        read_bytes, tokens = count_encoded(place, work.unit_bytes)
        rate = (tokens - before) / max(1e-3, time.perf_counter() - started_at)
        advance(read_bytes / 1e6 - shown, f"{tokens / 1e6:,.1f} M tokens, {rate / 1e6:.2f} M/s")
        shown = read_bytes / 1e6

    watch()
    return watch


def _is_with_slurm(place: Path) -> bool:
    """True, and said, if Slurm was given this work and has not ended it."""
    submitted = place / SLURM_JOB
    if not (submitted.is_file() and is_at_work(number := submitted.read_text(encoding="utf-8").strip())):
        return False
    echo(f"Slurm is at it already: see squeue --jobs {number}, or cancel that to begin again")
    return True


def _hand_to_slurm(place: Path, config: PrepareConfig) -> None:
    """Submit all steps as a chain of job arrays."""
    jobs = min(target_units(place), config.tasks or JOBS)
    comparing = comparing_steps(jobs) if config.near_duplicates == "drop" else []
    steps = [(tokenize_units, jobs), *comparing, (decide_all, 1), (write_shards, jobs), (publish_prepared, 1)]
    number = submit_to_slurm(steps, place, config)
    if place.is_dir():  # it may be done by now
        write_atomically(place / SLURM_JOB, f"{number}\n")
    echo(
        f"handed to Slurm, in {len(steps)} arrays of jobs; once job {number} is done, "
        "the same command finds it done"
    )


def _is_short(place: Path) -> bool:
    """True if there are fewer tokens than asked for, and units left that could bring more."""
    work = read_state(place)
    layout = decide_layout(place)
    tokens = sum(layout.starts[split][-1] for split in SPLITS)
    return work.tokens is not None and tokens < work.tokens and target_units(place) < len(work.units)


# ---------------------------------------------------------------- before the work begins


def _plan_work(config: PrepareConfig, source: Source, request: Request) -> PrepareState:
    """Divide the source into units. Raises ValueError for a file that can't be read, unless it is skipped."""
    sizes: dict[Part, int] = {}
    damaged: list[str] = []
    unit_bytes = max(UNIT_BYTES, sum(file.bytes for file in source.files) // MOST_UNITS)
    for file in source.files:
        try:
            parts = divide_file(file, config.text_column, unit_bytes)
            sizes |= {part: estimate_text_bytes(part, config.text_column) for part in parts}
        except DamagedFileError:
            if config.on_bad_file == "fail":
                raise
            damaged.append(file.name)
    units = group_parts(sizes, unit_bytes)
    return PrepareState(
        request=request,
        source=source.name,
        licence=source.licence,
        units=units,
        unit_bytes=tuple(sum(sizes[part] for part in unit) for unit in units),
        damaged_files=tuple(damaged),
        text_column=config.text_column,
        on_bad_text=config.on_bad_text,
        on_bad_file=config.on_bad_file,
        validation_fraction=_validation_fraction(config, source),
        tokens=config.tokens,
        shard_tokens=config.shard_tokens,
        benchmarks=tuple(benchmark_names(config.benchmark_paths)),
        on_contaminated=config.on_contaminated,
        near_duplicates=config.near_duplicates,
    )


def _build_tokenizer(place: Path, work: PrepareState, name: str) -> None:
    """Load or train it, and save it in the folder, whole or not at all."""
    partial_folder = place / "tokenizer.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    build_tokenizer(name, training_texts(work)).save(partial_folder)
    partial_folder.rename(place / "tokenizer")


def training_texts(work: PrepareState) -> Iterator[str]:
    """What a tokenizer may be trained on: no validation document, and none twice; a gigabyte at most.

    Reads nothing until asked for the first.
    """
    seen: set[bytes] = set()
    documents = documents_in_order(work)
    so_far = 0
    with progress("tokenizer", min(TRAINING_BYTES, sum(work.unit_bytes)) / 1e6, "MB") as advance:
        for document, fate in filter_documents(documents, work.on_bad_text):
            size = len(document.text.encode())
            advance(size / 1e6)
            so_far += size
            digest = document_hash(document.text)
            if fate in KEPT and digest not in seen:
                seen.add(digest)
                if split_of(document.text, work.validation_fraction) == "train":
                    yield document.text
            if so_far >= TRAINING_BYTES:
                return


def _estimate_bytes(place: Path, work: PrepareState) -> int:
    """About how much disk the units and the shards need, if all documents are like the first ones."""
    tokenizer = open_tokenizer(place)
    judged = itertools.islice(filter_documents(documents_in_order(work), "replace"), SAMPLED_DOCUMENTS)
    encoded = list(tokenize_documents(judged, tokenizer))
    tokens = sum(ids.size for _, _, ids in encoded)
    text_bytes = sum(len(document.text.encode()) for document, _, _ in encoded)
    expected = tokens * max(1.0, sum(work.unit_bytes) / max(1, text_bytes))
    if work.tokens is not None:
        expected = min(expected, work.tokens)
    return 2 * round(1.1 * expected * token_format(tokenizer.vocab_size).dtype.itemsize) + 2 * HEADER_BYTES


def _validation_fraction(config: PrepareConfig, source: Source) -> float:
    return source.validation_fraction if config.validation_fraction is None else config.validation_fraction


def _request(config: PrepareConfig, source: Source) -> Request:
    """What decides the content of the shards, in words that mean the same on every machine."""
    tokenizer = config.tokenizer_name
    if tokenizer not in NAMES and not tokenizer.startswith("bpe-"):  # a path: what lies there counts
        tokenizer = f"{Path(tokenizer).name} {load_tokenizer(tokenizer).fingerprint}"
    request: Request = {
        "source": source.name,
        "source_sha256": source.sha256,
        "text_column": config.text_column,
        "on_bad_text": config.on_bad_text,
        "on_bad_file": config.on_bad_file,
        "tokenizer": tokenizer,
        "validation_fraction": _validation_fraction(config, source),
        "tokens": config.tokens,
        "shard_tokens": config.shard_tokens,
    }
    if config.benchmark_paths:
        request["decontaminate"] = describe_benchmarks(benchmark_names(config.benchmark_paths))
        request["on_contaminated"] = config.on_contaminated
    if config.near_duplicates == "drop":
        request["near_duplicates"] = "drop"
    return request


def _find_prepared(folder: Path, request: Request) -> Manifest | None:
    """The manifest in `folder` if it holds this very request, None if there is nothing yet.

    Raises ValueError for anything else that is there, and if the shards are not sound.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is there and holds no shards of ours; give another --out")
    manifest = read_manifest(folder)
    before = manifest.request
    differing = [
        f"{name} is {before.get(name)} there and {request.get(name)} here"
        for name in {**request, **before}
        if before.get(name) != request.get(name) and name != "source_sha256"
    ]
    if not differing and before != request:
        differing = ["the text of the source has changed since"]
    if differing:
        raise ValueError(
            f"{folder} holds something else ({'; '.join(differing)}): give another --out, or delete it"
        )
    return verify(folder)


# ---------------------------------------------------------------- the steps of a preparation


TOKENS_OF_WRITER = 1_000_000_000  # that one process puts together: some seconds


def tokenize_units(place: Path, rank: int = 0, ranks: int = 1, threads: int = 1) -> None:
    """Every `ranks`-th unit to ids."""
    for number in range(rank, target_units(place), ranks):
        tokenize_unit(place, number, threads)


def decide_all(place: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """What becomes of each document, and which shards there will be. Raises ValueError if nothing is left."""
    layout, work = decide_so_far(place), read_state(place)
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


def decide_so_far(place: Path) -> ShardLayout:
    """What becomes of each document that is encoded. Raises ValueError if there are too many shards."""
    layout, work = decide_layout(place), read_state(place)
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
    layout, tokens = read_layout(place), read_state(place).shard_tokens
    all_shards = [(split, index) for split in SPLITS for index in range(layout.shards(split, tokens))]
    for split, index in all_shards[rank::ranks]:
        write_shard(place, split, index)


def write_complete_shards(place: Path, rank: int = 0, ranks: int = 1) -> None:
    """Every `ranks`-th shard, but for the last of each split, which is to grow."""
    layout, tokens = read_layout(place), read_state(place).shard_tokens
    complete = [(split, index) for split in SPLITS for index in _complete(layout, split, tokens)]
    for split, index in complete[rank::ranks]:
        write_shard(place, split, index)


def publish_prepared(place: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """The last of Slurm's jobs: the manifest, and the folder's own name."""
    finish(place)
    publish_folder(published_path(place))


def finish(place: Path) -> Manifest:
    """Write the manifest, and remove what only the work needed; goes on where it was killed."""
    if not is_complete(place):
        write_manifest(place, _describe_all(place))
    manifest = read_manifest(place)
    remove_traces(place, {shard.name for split in SPLITS for shard in manifest.shards(split)})
    flush_folder(place)
    return manifest


def _describe_all(place: Path) -> Manifest:
    layout, tokens = read_layout(place), read_state(place).shard_tokens
    shards = {
        split: tuple(write_shard(place, split, index) for index in range(layout.shards(split, tokens)))
        for split in SPLITS
    }
    return _describe(place, layout, shards)


def show_so_far(place: Path) -> None:
    """Say which shards are complete; of the held-out text, show the beginning even where it fills none."""
    layout, tokens = read_layout(place), read_state(place).shard_tokens
    shards = {
        split: tuple(write_shard(place, split, index) for index in _complete(layout, split, tokens))
        for split in SPLITS
    }
    shards["validation"] += tuple(write_first_shards(place, "validation"))
    write_manifest(place, _describe(place, layout, shards), SO_FAR)


def _complete(layout: ShardLayout, split: str, shard_tokens: int) -> range:
    """The shards of a split that nothing can change any more."""
    return range(layout.starts[split][-1] // shard_tokens)


def _describe(place: Path, layout: ShardLayout, shards: dict[str, tuple[Shard, ...]]) -> Manifest:
    work, tokenizer, fates = read_state(place), open_tokenizer(place), layout.fates
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
