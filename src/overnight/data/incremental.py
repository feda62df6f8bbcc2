"""Training on text that is still being prepared: from the shards that are complete already.

A preparation writes a shard as soon as nothing can change it any more, and says beside the shards, in
`so-far.json`, which these are: a manifest like the one at the end. Rows that are shuffled among a limited
number of tokens (`shuffle_window`) can be read from them, and are the very rows of the finished folder.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from overnight.data.atomic_folder import is_locked_folder, staging_path
from overnight.data.loader import Batch, TokenStream
from overnight.data.shards import (
    MANIFEST,
    SO_FAR,
    Manifest,
    Shard,
    ShardFile,
    files_at_once,
    read_manifest,
    verify_shard,
)
from overnight.terminal import echo

POLL_SECONDS = 1.0


class IncrementalFolder:
    """A folder that is being prepared, with the shards that are complete so far, each read and found sound.

    Raises ValueError if there are none, or one is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: set[str] = set()
        self._open = functools.lru_cache(files_at_once())(self._open_anew)
        self._growing: dict[str, ShardFile] = {}
        self.manifest, self.is_complete = self._take_in(self.place)

    def __str__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        """Where a shard, or the tokenizer's folder, lies at this moment."""
        return self.place / name

    def refresh(self) -> None:
        """Take in what has become complete since. Raises ValueError as the constructor does."""
        place = self.place
        if place != self.folder and not (place / SO_FAR).is_file():
            return  # it is about to get its name
        try:
            self.manifest, self.is_complete = self._take_in(place)
        except ValueError:
            if self.place == place:
                raise
            self.manifest, self.is_complete = self._take_in(self.folder)  # where it has moved just now

    def open(self, shard: Shard) -> ShardFile:
        """One of its shards."""
        return self._growing.get(shard.name) or self._open(shard.name)

    def path(self, shard: Shard) -> Path:
        """Where one of its shards lies at this moment."""
        return self / shard.name

    @property
    def place(self) -> Path:
        """Where it lies at this moment: hidden until it is complete."""
        return self.folder if (self.folder / MANIFEST).is_file() else staging_path(self.folder)

    def _take_in(self, place: Path) -> tuple[Manifest, bool]:
        """The manifest of a place, all of whose shards are sound, and whether it is the last one."""
        is_complete = place == self.folder
        manifest = read_manifest(place, MANIFEST if is_complete else SO_FAR)
        for shard in (*manifest.train, *manifest.validation):
            if shard.name not in self._verified:
                verify_shard(place, shard, manifest.vocab_size)
                self._verified.add(shard.name)
            if shard.is_growing and shard.name not in self._growing:
                self._growing[shard.name] = ShardFile(place / shard.name)  # readable when it is long gone
        return manifest, is_complete

    def _open_anew(self, name: str) -> ShardFile:
        try:
            return ShardFile(self / name)
        except ValueError:
            return ShardFile(self / name)  # where it has moved just now


def is_being_prepared(folder: Path) -> bool:
    """True if a part of a folder is there, whether anybody is at it or not."""
    return not (folder / MANIFEST).is_file() and staging_path(folder).is_dir()


def open_incremental(folder: Path, shuffle_window: int) -> IncrementalFolder:
    """A folder that is being prepared, once its first rows can be read.

    Raises ValueError if they can't, and nobody prepares it any more.
    """
    told = False
    while not has_shuffle_window(folder, shuffle_window):
        if not is_locked_folder(folder) and not has_shuffle_window(folder, shuffle_window):
            raise ValueError(
                f"{folder} has not the {2 * shuffle_window:,} training tokens yet that shuffle_window="
                f"{shuffle_window} begins with, and nobody prepares it any more: give the command that began "
                "it once more"
            )
        if not told:
            echo(f"waiting for the first {2 * shuffle_window:,} training tokens of {folder}")
        told = True
        time.sleep(POLL_SECONDS)
    return IncrementalFolder(folder)


def has_shuffle_window(folder: Path, shuffle_window: int) -> bool:
    """True if the first portion of the training tokens is complete, and known not to be the last."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        return read_manifest(staging_path(folder), SO_FAR).tokens("train") >= 2 * shuffle_window
    except ValueError:  # there is none yet, or none any more
        return False


class IncrementalStream:
    """The training rows of a folder that is being prepared: of all portions but the last one so far."""

    def __init__(
        self, folder: IncrementalFolder, *, tokens_per_row: int, seed: int, shuffle_window: int
    ) -> None:
        self.folder = folder
        self.tokens_per_row, self.seed, self._shuffle_tokens = tokens_per_row, seed, shuffle_window
        self._take_in()

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... Raises ValueError if one of them is not ready."""
        if not self.is_ready(first_row + rows):
            raise ValueError(f"row {first_row + rows} is not prepared yet in {self.folder}")
        return self._known.batch(first_row, rows)

    def is_ready(self, rows: int) -> bool:
        """True if the first so many rows can be read; looks for new shards if they can't."""
        if self.folder.is_complete or rows <= self._known.rows_before_last_portion:
            return True
        self.folder.refresh()
        if self.folder.manifest is not self._known.manifest:
            self._take_in()
        return self.folder.is_complete or rows <= self._known.rows_before_last_portion

    def wait_for(self, rows: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """True once the first so many rows can be read; False if `stopped()`, or if nobody prepares them."""
        told = False
        while not self.is_ready(rows):
            if stopped():
                return False
            if not is_locked_folder(self.folder.folder) and not self.is_ready(rows):
                echo(
                    f"the next step needs more text, and nobody prepares {self.folder} any more: give the "
                    "command that began it once more"
                )
                return False
            if not told:
                echo(f"waiting for the preparation of {self.folder}")
            told = True
            time.sleep(POLL_SECONDS)
        return True

    def _take_in(self) -> None:
        self._known = TokenStream(
            self.folder,
            tokens_per_row=self.tokens_per_row,
            seed=self.seed,
            shuffle_window=self._shuffle_tokens,
        )
        self.tokens, self.windows_per_epoch = self._known.tokens, self._known.windows_per_epoch  # so far
