"""A recipe's text, ready to train on: prepared if it is not yet, opened if it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a recipe is read without torch, so that --help is instant
    from overnight.data.shards import Manifest
    from overnight.data.stream import TokenStream
    from overnight.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and what turns it into ids."""

    data: str = "python-docs"
    """A named source, a file or folder of text, or a folder that `overnight prepare` wrote."""
    tokenizer: str = "gpt2"
    """gpt2, characters, bpe-N (trained on the text, N ids), or a folder or file that holds one."""
    validation_fraction: float | None = None
    """Share of the documents held out, chosen by their hash; `prepare`'s own choice if left out."""


@dataclass(frozen=True)
class Materials:
    """A folder of shards, verified, and its tokenizer."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def describe(self) -> DataConfig:
        """The recipe's section that names exactly these shards."""
        fraction = self.manifest.request.get("validation_fraction")
        assert fraction is None or isinstance(fraction, float)
        return DataConfig(
            data=str(self.folder), tokenizer=self.manifest.tokenizer, validation_fraction=fraction
        )

    def stream(self, split: str, tokens_per_row: int, seed: int) -> TokenStream:
        """The rows of one split: "train" or "validation"."""
        from overnight.data.stream import TokenStream

        return TokenStream(self.folder, split, tokens_per_row=tokens_per_row, seed=seed)

    def text(self, split: str) -> bytes:
        """All documents of one split, in order, end to end."""
        from overnight.data.token_file import open_tokens

        shards = (open_tokens(self.folder / shard.name) for shard in self.manifest.shards(split))
        return b"".join(self.tokenizer.decode_bytes(ids.tolist()) for ids in shards)


def open_materials(config: DataConfig) -> Materials:
    """Open the shards `config` names, preparing them first where they are not there yet."""
    from overnight.data.prepare import PrepareConfig, output_folder, prepare
    from overnight.data.shards import load_prepared_tokenizer, read_manifest

    folder = Path(config.data)
    if not (folder / "manifest.json").is_file():
        request = PrepareConfig(
            source=config.data, tokenizer=config.tokenizer, validation_fraction=config.validation_fraction
        )
        prepare(request)
        folder = output_folder(request)
    return Materials(folder, read_manifest(folder), load_prepared_tokenizer(folder))
