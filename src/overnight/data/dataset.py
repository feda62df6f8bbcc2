"""A recipe's text, ready to train on: prepared if it is not yet, opened if it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.data import DataConfig, MixtureSource
from overnight.data.incremental import (
    IncrementalFolder,
    IncrementalStream,
    is_being_prepared,
    open_incremental,
)
from overnight.data.loader import TokenStream
from overnight.data.mixture import Concatenation, Mixture
from overnight.data.packing import BestFitStream
from overnight.data.remote import RemoteFolder, is_prepared_elsewhere
from overnight.data.shards import (
    MANIFEST,
    SHARD_NAME,
    SPLITS,
    Manifest,
    load_prepared_tokenizer,
    open_tokens,
    read_manifest,
)
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """A folder of shards, verified, and its tokenizer."""

    folder: Path | RemoteFolder | IncrementalFolder
    manifest: Manifest
    """As it was when the folder was opened."""
    tokenizer: Tokenizer
    config: DataConfig

    @property
    def document_separator(self) -> int | None:
        """The id that begins a document into which none before it is to be seen; None if all of a row is."""
        return self.manifest.end_of_text if self.config.packing == "documents" else None

    def describe(self) -> DataConfig:
        """The recipe's section that names exactly these shards."""
        fraction = self.manifest.request.get("validation_fraction")
        assert fraction is None or isinstance(fraction, float)
        return dataclasses.replace(
            self.config,
            data=str(self.folder),
            tokenizer=self.manifest.tokenizer,
            validation_fraction=fraction,
        )

    def record(self) -> dict[str, Any]:
        """What a run writes down of its text, by which it is known again."""
        if isinstance(self.folder, Path):
            return dataclasses.asdict(self.manifest)
        is_complete = getattr(self.folder, "is_complete", True)
        return dataclasses.asdict(self.folder.manifest) | ({} if is_complete else {"is_complete": False})

    def training_rows(
        self, tokens_per_row: int, seed: int
    ) -> TokenStream | BestFitStream | IncrementalStream:
        """The rows of the training split, as `packing` has them."""
        folder, portion = self.folder, self.config.shuffle_window
        if self.config.packing == "best-fit":
            return BestFitStream(folder, tokens_per_row=tokens_per_row, seed=seed)
        if portion is not None and isinstance(folder, IncrementalFolder):
            return IncrementalStream(folder, tokens_per_row=tokens_per_row, seed=seed, shuffle_window=portion)
        return TokenStream(folder, tokens_per_row=tokens_per_row, seed=seed, shuffle_window=portion)

    def stream(self, split: str, tokens_per_row: int, seed: int) -> TokenStream:
        """The rows of one split, "train" or "validation", as windows over its tokens."""
        return TokenStream(self.folder, split, tokens_per_row=tokens_per_row, seed=seed)

    def text(self, split: str) -> bytes:
        """All documents of one split, in order, end to end."""
        shards = (open_tokens(self.folder / shard.name) for shard in self.manifest.shards(split))
        return b"".join(self.tokenizer.decode_bytes(ids.tolist()) for ids in shards)


def open_one_dataset(config: DataConfig) -> Dataset:
    """Open the shards that `data` names, preparing them first where they are not there yet.

    Where they are being prepared, and `shuffle_window` allows to begin, those that are complete. Raises
    ValueError if it does not, and for a folder that is there in part and that nobody prepares any more.
    """
    if is_prepared_elsewhere(config.data):
        remote = RemoteFolder(config.data, config.cache_bytes)
        return Dataset(remote, remote.manifest, load_prepared_tokenizer(remote.folder), config)
    request = PrepareConfig(
        source=config.data, tokenizer=config.tokenizer, validation_fraction=config.validation_fraction
    )
    folder = Path(config.data)
    is_named = (folder / MANIFEST).is_file() or is_being_prepared(folder)
    folder = folder if is_named else output_folder(request)
    if (folder / MANIFEST).is_file():
        return Dataset(folder, read_manifest(folder), load_prepared_tokenizer(folder), config)
    if config.shuffle_window is not None and is_being_prepared(folder):
        growing = open_incremental(folder, config.shuffle_window)
        tokenizer = load_prepared_tokenizer(growing.current_path, growing.manifest)
        return Dataset(growing, growing.manifest, tokenizer, config)
    if is_named:
        raise ValueError(
            f"{folder} is not prepared to its end: wait until it is, or give the command that began it once "
            "more; with --shuffle-window 100_000_000, training begins with what is complete"
        )
    if any(SHARD_NAME.fullmatch(path.name) for path in Path(config.data).glob("*.bin")):
        raise ValueError(
            f"{config.data} holds shards and no {MANIFEST} that vouches for them: bring it back from a "
            "copy, or prepare the text again into another folder"
        )
    if prepare(request) is None:
        raise ValueError(f"{folder} is being prepared by Slurm's jobs: wait until they are done")
    return Dataset(folder, read_manifest(folder), load_prepared_tokenizer(folder), config)


def is_same_data(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """True if a run that recorded its text as `before` may go on with `now`: more of it may be complete."""
    if before.get("is_complete", True):
        return before == now
    facts = ("request", "tokenizer_fingerprint", "split_rule")
    shards = now["train"][: len(before["train"])]
    return before["train"] == shards and all(before[name] == now[name] for name in facts)


# ---------------------------------------------------------------- the texts of a recipe


@dataclass(frozen=True)
class MixtureDataset:
    """Folders of shards, all of one tokenizer, and the weight of each."""

    parts: tuple[Dataset, ...]
    weights: tuple[float, ...]
    config: DataConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """Of every part."""
        return self.parts[0].tokenizer

    @property
    def document_separator(self) -> int | None:
        """See `Materials.document_separator`."""
        return self.parts[0].document_separator

    @property
    def folder(self) -> str:
        """Where the parts lie, in words."""
        return ", ".join(str(part.folder) for part in self.parts)

    def describe(self) -> DataConfig:
        """The recipe's section that names exactly these shards."""
        sources = tuple(
            MixtureSource(path=str(part.folder), weight=weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        tokenizer = self.parts[0].describe().tokenizer
        return dataclasses.replace(self.config, data="", mixture=sources, tokenizer=tokenizer)

    def record(self) -> dict[str, Any]:
        """What a run writes down of its texts: facts about each, and the shards of all."""
        found: dict[str, Any] = {}
        shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for part, weight in zip(self.parts, self.weights, strict=True):
            facts = part.record()
            for split in SPLITS:
                shards[split] += [
                    shard | {"name": f"{part.folder}/{shard['name']}"} for shard in facts.pop(split)
                ]
            del facts["request"]
            found[str(part.folder)] = {"weight": weight, **facts}
        return found | shards

    def training_rows(self, tokens_per_row: int, seed: int) -> Mixture:
        """The rows of all training splits, mixed; each as `packing` has them."""
        streams = {str(part.folder): part.training_rows(tokens_per_row, seed) for part in self.parts}
        return Mixture(streams, self.weights)

    def stream(self, split: str, tokens_per_row: int, seed: int) -> Concatenation:
        """One split of all, "train" or "validation", to be judged on."""
        return Concatenation(
            {str(part.folder): part.stream(split, tokens_per_row, seed) for part in self.parts}
        )


def open_dataset(config: DataConfig) -> Dataset | MixtureDataset:
    """Open what a recipe trains on, preparing first what is not prepared yet.

    Raises ValueError if the sources of a mixture are not all written with one tokenizer.
    """
    if not config.mixture:
        return open_one_dataset(config)
    parts = tuple(
        open_one_dataset(dataclasses.replace(config, data=source.path, mixture=()))
        for source in config.mixture
    )
    first = parts[0]
    for part in parts[1:]:
        if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ValueError(
                f"{part.folder} is written with the tokenizer {part.tokenizer.name} and {first.folder} with "
                f"another, {first.tokenizer.name}: prepare {part.folder} again with "
                f"--tokenizer {first.folder}/tokenizer"
            )
    if growing := next((part.folder for part in parts if "is_complete" in part.record()), None):
        raise ValueError(f"{growing} is still being prepared, and the texts of a mixture must be complete")
    folders = [str(part.folder) for part in parts]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"two of the sources are {twice}: give it once, with the sum of their weights")
    return MixtureDataset(parts, tuple(source.weight for source in config.mixture), config)
