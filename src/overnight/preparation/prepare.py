"""Documents to shards, as one pipeline.

    source -> units -> ids of each unit -> status of each document -> layout -> shards -> manifest

Units are tokenized by any worker, then the layout is decided from a few bytes per document, then the shards
are written by any worker. Memory use is constant, a killed preparation continues where it stopped, and the
result is the same, byte for byte, for any number of workers on any number of machines. The folder is
renamed to its final name when it is complete.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from overnight.config import raise_problems
from overnight.data import DataConfig, MixtureSource
from overnight.data.atomic_folder import (
    exclusive,
    plain_file_errors,
    publish_folder,
    published_path,
    require_disk_space,
    staging_folder,
)
from overnight.data.remote import RemoteFolder, is_prepared_elsewhere
from overnight.data.shards import (
    MANIFEST,
    SHARD_NAME,
    SO_FAR,
    SPLITS,
    Manifest,
    is_being_prepared,
    read_manifest,
    verify,
    write_manifest,
)
from overnight.data.text_files import DamagedFileError, count_files, describe_missing
from overnight.files import flush_folder
from overnight.preparation import assemble, decontaminate, executors, tokenize
from overnight.preparation.documents import Part, divide_file, spans_of
from overnight.preparation.identity import (
    choose_folder,
    describe_request,
    find_prepared,
    require_identity,
    text_request,
)
from overnight.preparation.import_shards import plan_import
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.preparation.prepare_state import (
    PrepareState,
    Request,
    is_begun,
    is_complete,
    must_tokenize_again,
    open_encoder,
    remove_traces,
    request_units,
    target_units,
    write_state,
)
from overnight.preparation.sources import PYTHON_DOCS, Source, open_source, parse_python_docs
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import NAMES, load_tokenizer

UNIT_BYTES = 16_000_000  # of text: a second of one core
MOST_UNITS = 10_000  # limits the number of files of a large source
EARLY_BYTES = 1_000_000_000  # of text, after which the first shards are published: a minute of two cores
BYTES_PER_TOKEN_AT_MOST = 6  # 4.5 for English in GPT-2's tokens
PART_DIGITS = 5  # of a numbered part of a text, as in part-00000; a year has four
TOKENS_PER_WRITER = 1_000_000_000  # tokens per writing process: a few seconds


def prepare_shards(config: PrepareConfig) -> Manifest | None:
    """`prepare_folder`, and the manifest of the folder."""
    folder = prepare_folder(config)
    return None if folder is None else read_manifest(folder)


def prepare_folder(config: PrepareConfig) -> Path | None:
    """The folder of shards of this request: prepared, or verified if the same request filled it before.

    None if Slurm does the work and is not done yet. Raises ValueError for a request that can't be met;
    the folder does not exist then.
    """
    raise_problems(config.problems(), "prepare")
    with plain_file_errors(output_folder(config)):
        folder = find_prepared(config) if config.from_shards is None else None
        if folder is None:
            preparation = _plan_text(config) if config.from_shards is None else plan_import(config)
            folder = choose_folder(config, preparation.request)
            if not (folder / MANIFEST).is_file():
                with exclusive(folder):
                    if not (folder / MANIFEST).is_file():
                        return None if preparation.fill(folder) is None else folder
                    require_identity(folder, preparation.request)  # prepared by another process since
        verify(folder)
    echo(f"{folder} is already prepared, and its checksums match")
    return folder


def ensure_prepared(config: DataConfig) -> DataConfig:
    """Prepare each text of `config` that is not prepared yet; returns `config` with the prepared folders.

    With `shuffle_window`, a folder that is still being prepared is returned as it is. Raises ValueError for a
    folder that is incomplete and can't be used yet, and for shards without a manifest.
    """
    data = config.data if config.mixture else _ensure_text(config.data, config)
    mixture = tuple(
        MixtureSource(path=_ensure_text(source.path, config), weight=source.weight)
        for source in config.mixture
    )
    return dataclasses.replace(config, data=data, mixture=mixture)


def require_tokenizer(config: DataConfig) -> None:
    """Raise ValueError if a prepared folder or URL was made with another tokenizer than `config` names."""
    named = config.tokenizer
    for path in [source.path for source in config.mixture] or [config.data]:
        if is_prepared_elsewhere(path):
            manifest = RemoteFolder(path, config.cache_bytes).manifest
        elif (Path(path) / MANIFEST).is_file():
            manifest = read_manifest(Path(path))
        else:
            continue  # a text: it will be prepared with this tokenizer
        if named in {manifest.tokenizer, manifest.request.get("tokenizer")}:
            continue
        has_fixed_name = named in NAMES or named.startswith("bpe-")
        if has_fixed_name or load_tokenizer(named).fingerprint != manifest.tokenizer_fingerprint:
            raise ValueError(
                f"{path} was prepared with the tokenizer {manifest.tokenizer}, not {named}: leave "
                "--tokenizer out, or give --data the text itself"
            )


def _ensure_text(path: str, config: DataConfig) -> str:
    """The folder or URL of the shards of one text, prepared first if it is not yet."""
    if is_prepared_elsewhere(path):
        return path
    folder, growing = Path(path), config.shuffle_window is not None
    if (folder / MANIFEST).is_file() or (growing and is_being_prepared(folder)):
        return str(folder)
    if is_being_prepared(folder):
        raise ValueError(
            f"{folder} is not fully prepared: wait until it is, or run the command that started it again; "
            "with --shuffle-window 100_000_000, training starts with what is complete"
        )
    if any(SHARD_NAME.fullmatch(file.name) for file in folder.glob("*.bin")):
        raise ValueError(
            f"{path} holds shards and no {MANIFEST}: restore it from a copy, or prepare the text again into "
            "another folder"
        )
    request = text_request(path, config)
    if (found := find_prepared(request, unfinished=growing) or prepare_folder(request)) is None:
        raise ValueError(
            f"{output_folder(request)} is being prepared by Slurm's jobs: wait until they are done"
        )
    return str(found)


@dataclass(frozen=True)
class TextPreparation:
    """A source that is to become a folder of shards."""

    config: PrepareConfig
    source: Source
    request: Request
    """The options that decide the content of the folder."""

    def fill(self, folder: Path) -> Manifest | None:
        """Do the remaining work; None if Slurm does it. Must be called within `exclusive`."""
        state = _plan_work(self.config, self.source, self.request)
        with staging_folder(folder, lambda staging: is_begun(staging, state)) as staging:
            if executors.is_with_slurm(staging):
                return None
            if not is_complete(staging):
                units = _begin(staging, state)
                if self.config.executor == "slurm":
                    _submit(staging, self.config)
                    return None
                layout = _tokenize_until_enough(staging, state, units)
                executors.run_step(assemble.write_shards, staging, _count_writers(layout), self.config)
            manifest = finish(staging)
        publish_folder(folder)
        return manifest


def _plan_text(config: PrepareConfig) -> TextPreparation:
    source = open_source(config.source or "", config.subset, config.from_file, config.text_column)
    if missing := describe_missing((file.name for file in source.files), PART_DIGITS):
        echo(missing)
    if config.validation_fraction is not None:
        source = dataclasses.replace(source, validation_fraction=config.validation_fraction)
    return TextPreparation(config, source, describe_request(config, source))


def _plan_work(config: PrepareConfig, source: Source, request: Request) -> PrepareState:
    """Divide the source into units of up to about `UNIT_BYTES` of text, at least one.

    Raises ValueError for a file that can't be read, unless it is skipped.
    """
    sizes: dict[Part, int] = {}
    damaged_files: list[str] = []
    unit_bytes = max(UNIT_BYTES, sum(file.bytes for file in source.files) // MOST_UNITS)
    for file in source.files:
        try:
            sizes |= divide_file(file, config.text_column, unit_bytes)
        except DamagedFileError:
            if config.on_bad_file == "fail":
                raise
            damaged_files.append(file.name)
    if PYTHON_DOCS in source.files:
        parse_python_docs()  # now, since its progress bar must not overlap another
    parts, part_bytes = tuple(sizes), tuple(sizes.values())
    spans = [slice(*span) for span in spans_of(part_bytes, unit_bytes)]
    return PrepareState(
        request=request,
        source=source.name,
        licence=source.licence,
        config=config,
        units=tuple(parts[span] for span in spans),
        unit_bytes=tuple(sum(part_bytes[span]) for span in spans),
        damaged_files=tuple(damaged_files),
        validation_fraction=source.validation_fraction,
        files_read=count_files(source.files),
        files_left_alone=source.files_left_alone,
    )


def _begin(staging: Path, state: PrepareState) -> int:
    """Write the common files into the staging folder; returns the number of units probably needed."""
    tokens, benchmarks = state.config.tokens, state.config.benchmark_paths
    units = state.units_for(float("inf") if tokens is None else tokens * BYTES_PER_TOKEN_AT_MOST)
    if not is_begun(staging, state):
        (staging / "units").mkdir()
        early = state.units_for(EARLY_BYTES) if _shows_early(state.config) else units
        request_units(staging, min(units, early))
        write_state(staging, state)
    if benchmarks and not (staging / decontaminate.BENCHMARKS).is_file():
        decontaminate.save_index(staging, benchmarks)
    if not (staging / "tokenizer").is_dir():
        tokenize.save_tokenizer(staging, state)
        if slower := open_encoder(staging)[1]:
            echo(slower)
        require_disk_space(staging, tokenize.estimate_bytes(staging, state))
    return units


def _tokenize_until_enough(staging: Path, state: PrepareState, enough: int) -> assemble.ShardLayout:
    """Tokenize `enough` units, and more if they hold too few tokens; returns the layout of the shards.

    Works in waves, each as large as all earlier ones together; after each but the last, publishes shards.
    """
    config, units = state.config, target_units(staging)
    wanted = float("inf") if config.tokens is None else config.tokens
    with tokenize.tokenizing_bar(staging, state, enough):
        while True:
            _, threads = executors.divide_workers(config, units)
            step = partial(tokenize.tokenize_units, threads=threads)
            executors.run_step(step, staging, units, config)
            if must_tokenize_again(staging):
                continue
            layout = assemble.decide_layout(staging, state, units)
            if units == len(state.units) or (units >= enough and layout.tokens >= wanted):
                assemble.require_documents(state, layout)
                return layout
            if _shows_early(config):
                show_so_far(staging, config, layout)
            units = min(enough if units < enough else len(state.units), 2 * units)
            request_units(staging, units)


def _shows_early(config: PrepareConfig) -> bool:
    """True if shards are published as soon as they are complete.

    Near-duplicates are known only at the end; on a cluster, each pause costs the start of new jobs.
    """
    return config.executor == "local" and config.near_duplicates == "keep"


def show_so_far(staging: Path, config: PrepareConfig, layout: assemble.ShardLayout) -> None:
    """Write the shards that are complete, and list them in so-far.json for a training that reads them.

    Of the validation split also the beginning of the next shard is listed.
    """
    executors.run_step(
        partial(assemble.write_shards, only_full=True), staging, _count_writers(layout), config
    )
    assembler = assemble.ShardAssembler(staging)
    shards = {split: assembler.write_split(split, only_full=True) for split in SPLITS}
    shards["validation"] += assembler.write_unfinished("validation")
    write_manifest(staging, assembler.manifest(shards), SO_FAR)


def _count_writers(layout: assemble.ShardLayout) -> int:
    return max(1, -(-layout.tokens // TOKENS_PER_WRITER))


def finish(staging: Path) -> Manifest:
    """Write the manifest and remove all temporary files; continues where it was killed."""
    if not is_complete(staging):
        assembler = assemble.ShardAssembler(staging)
        write_manifest(staging, assembler.manifest({split: assembler.write_split(split) for split in SPLITS}))
    manifest = read_manifest(staging)
    remove_traces(staging, {shard.name for shard in manifest.shards()})
    flush_folder(staging)
    return manifest


def publish_prepared(staging: Path, _rank: int = 0, _ranks: int = 1) -> None:
    """Slurm's last step: write the manifest and rename the folder."""
    finish(staging)
    publish_folder(published_path(staging))


def _submit(staging: Path, config: PrepareConfig) -> None:
    jobs = min(target_units(staging), config.tasks or executors.DEFAULT_JOBS)
    steps: list[tuple[executors.Step, int]] = [
        (tokenize.tokenize_units, jobs),
        (assemble.decide_shards, 1),
        (assemble.write_shards, jobs),
        (publish_prepared, 1),
    ]
    executors.submit_to_slurm(steps, staging, config)
