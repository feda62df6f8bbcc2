"""The texts of a recipe: one, or several that are mixed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from overnight.data.mixture import Concatenation, Mixture
from overnight.data.shards import SPLITS
from overnight.stages.materials import DataConfig, Materials, MixedText, open_materials
from overnight.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class MixedMaterials:
    """Folders of shards, all of one tokenizer, and the weight of each."""

    parts: tuple[Materials, ...]
    weights: tuple[float, ...]
    config: DataConfig

    @property
    def tokenizer(self) -> Tokenizer:
        """Of every part."""
        return self.parts[0].tokenizer

    @property
    def boundary(self) -> int | None:
        """See `Materials.boundary`."""
        return self.parts[0].boundary

    @property
    def folder(self) -> str:
        """Where the parts lie, in words."""
        return ", ".join(str(part.folder) for part in self.parts)

    def describe(self) -> DataConfig:
        """The recipe's section that names exactly these shards."""
        sources = tuple(
            MixedText(path=str(part.folder), weight=weight)
            for part, weight in zip(self.parts, self.weights, strict=True)
        )
        tokenizer = self.parts[0].describe().tokenizer
        return dataclasses.replace(self.config, data="", sources=sources, tokenizer=tokenizer)

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


def gather_materials(config: DataConfig) -> Materials | MixedMaterials:
    """Open what a recipe trains on, preparing first what is not prepared yet.

    Raises ValueError if the sources of a mixture are not all written with one tokenizer.
    """
    if not config.sources:
        return open_materials(config)
    parts = tuple(
        open_materials(dataclasses.replace(config, data=source.path, sources=())) for source in config.sources
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
    return MixedMaterials(parts, tuple(source.weight for source in config.sources), config)
