"""Prepared data, opened for training: one folder of shards, or several mixed by weight. Prepares nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.data import DataConfig, MixtureSource
from overnight.data.incremental import IncrementalFolder, IncrementalStream, open_incremental
from overnight.data.loader import TokenStream
from overnight.data.mixture import Concatenation, Mixture
from overnight.data.packing import BestFitStream
from overnight.data.remote import RemoteFolder, is_prepared_elsewhere
from overnight.data.shards import (
    FILE_COUNTS,
    MANIFEST,
    SPLITS,
    Manifest,
    is_being_prepared,
    load_prepared_tokenizer,
    read_manifest,
)
from overnight.terminal import quote, shell_command
from overnight.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """A folder of shards, verified, and its tokenizer."""

    folder: Path | RemoteFolder | IncrementalFolder
    manifest: Manifest
    """The manifest at the time the folder was opened."""
    tokenizer: Tokenizer
    config: DataConfig

    @property
    def document_separator(self) -> int | None:
        """The id that begins a document which attention must not cross; None if it may cross documents."""
        return self.manifest.end_of_text if self.config.packing == "documents" else None

    def describe(self) -> DataConfig:
        """The recipe section that names these shards."""
        fraction = self.manifest.request.get("validation_fraction")
        return dataclasses.replace(
            self.config,
            data=str(self.folder),
            tokenizer=self.manifest.tokenizer,
            validation_fraction=None if fraction is None else float(fraction),
        )

    def record(self) -> dict[str, Any]:
        """The facts about its data that a run records, to recognise the data on resuming."""
        growing = self.folder if isinstance(self.folder, IncrementalFolder) else None
        # A growing folder may have more shards than at the opening, perhaps all.
        facts = dataclasses.asdict(self.manifest if growing is None else growing.manifest)
        for name in FILE_COUNTS:  # do not decide the tokens
            del facts[name]
        return facts if growing is None or growing.is_complete else facts | {"is_complete": False}

    def training_rows(
        self, tokens_per_row: int, seed: int
    ) -> TokenStream | BestFitStream | IncrementalStream:
        """The rows of the training split, packed as `packing` says."""
        folder, window = self.folder, self.config.shuffle_window
        if self.config.packing == "best-fit":
            return BestFitStream(folder, tokens_per_row=tokens_per_row, seed=seed)
        if window is not None and isinstance(folder, IncrementalFolder):
            return IncrementalStream(folder, tokens_per_row=tokens_per_row, seed=seed, shuffle_window=window)
        return TokenStream(folder, tokens_per_row=tokens_per_row, seed=seed, shuffle_window=window)

    def stream(self, split: str, tokens_per_row: int, seed: int) -> TokenStream:
        """The rows of one split, "train" or "validation", as windows over its tokens."""
        return TokenStream(self.folder, split, tokens_per_row=tokens_per_row, seed=seed)


@dataclass(frozen=True)
class MixtureDataset:
    """Several datasets of one tokenizer, and the weight of each."""

    parts: tuple[Dataset, ...]
    weights: tuple[float, ...]
    config: DataConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of every part."""
        return self.parts[0].tokenizer

    @property
    def document_separator(self) -> int | None:
        """See `Dataset.document_separator`."""
        return self.parts[0].document_separator

    @property
    def folder(self) -> str:
        """The folders of the parts, for messages."""
        return ", ".join(str(part.folder) for part in self.parts)

    def describe(self) -> DataConfig:
        """The recipe section that names these shards."""
        mixture = tuple(
            MixtureSource(path=str(part.folder), weight=weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        tokenizer = self.parts[0].describe().tokenizer
        return dataclasses.replace(self.config, data="", mixture=mixture, tokenizer=tokenizer)

    def record(self) -> dict[str, Any]:
        """The facts that a run records of its data: those of each part, and the shards of all."""
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
        """The rows of all training splits, mixed; each packed as `packing` says."""
        streams = {str(part.folder): part.training_rows(tokens_per_row, seed) for part in self.parts}
        return Mixture(streams, self.weights)

    def stream(self, split: str, tokens_per_row: int, seed: int) -> Concatenation:
        """One split of all parts, "train" or "validation", for evaluation."""
        return Concatenation(
            {str(part.folder): part.stream(split, tokens_per_row, seed) for part in self.parts}
        )


def open_dataset(config: DataConfig) -> Dataset | MixtureDataset:
    """Open the prepared data of a recipe.

    Raises ValueError if it is not prepared, and if the parts of a mixture have different tokenizers.
    """
    if not config.mixture:
        return open_one_dataset(config)
    parts = tuple(
        open_one_dataset(dataclasses.replace(config, data=source.path, mixture=()))
        for source in config.mixture
    )
    first = parts[0]
    for part in parts:
        if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ValueError(
                f"{part.folder} was prepared with the tokenizer {part.tokenizer.name}, {first.folder} with "
                f"{first.tokenizer.name}: prepare {part.folder} again with "
                f"--tokenizer {quote(f'{first.folder}/tokenizer')}"
            )
    if incomplete := next((part.folder for part in parts if "is_complete" in part.record()), None):
        raise ValueError(f"{incomplete} is still being prepared, and the texts of a mixture must be complete")
    folders = [str(part.folder) for part in parts]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"{twice} is twice in mixture: give it once, with the sum of the weights")
    return MixtureDataset(parts, tuple(source.weight for source in config.mixture), config)


def open_one_dataset(config: DataConfig) -> Dataset:
    """Open the prepared folder or URL that `config.data` names.

    With `shuffle_window`, a folder that is still being prepared is opened with the shards that are complete.
    Raises ValueError if the folder is not prepared.
    """
    if is_prepared_elsewhere(config.data):
        remote = RemoteFolder(config.data, config.cache_bytes)
        return Dataset(remote, remote.manifest, load_prepared_tokenizer(remote.folder), config)
    folder = Path(config.data)
    if (folder / MANIFEST).is_file():
        return Dataset(folder, read_manifest(folder), load_prepared_tokenizer(folder), config)
    if config.shuffle_window is not None and is_being_prepared(folder):
        incomplete = open_incremental(folder, config.shuffle_window)
        tokenizer = load_prepared_tokenizer(incomplete.current_path, incomplete.manifest)
        return Dataset(incomplete, incomplete.manifest, tokenizer, config)
    raise ValueError(f"{folder} is not prepared data: run `{shell_command('prepare', folder)}`")


def is_same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if a run that recorded its data as `before` may resume with `now`: more shards may be complete.

    The folders of a mixture may have moved.
    """
    before, now = _without_folders(before), _without_folders(now)
    if before.get("is_complete", True):
        return before == now
    facts = ("request", "tokenizer_fingerprint", "split_rule")
    shards = now["train"][: len(before["train"])]
    return before["train"] == shards and all(before[name] == now[name] for name in facts)


def _without_folders(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of a mixture without the paths of its folders, in their order; other records unchanged."""
    parts = [fact for fact in record.values() if isinstance(fact, dict) and "weight" in fact]
    if not parts:
        return record
    shards = {
        split: [shard | {"name": Path(shard["name"]).name} for shard in record[split]] for split in SPLITS
    }
    return {"parts": parts, **shards}
