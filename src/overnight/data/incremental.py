"""Training on text that is still being prepared, from the shards that are already complete.

A preparation publishes a shard as soon as it is final, and lists the published shards in
`so-far.json`, a manifest like the final one. Rows that are shuffled within a limited number of tokens
(`shuffle_window`) can be read from them, and are the same rows as those of the finished folder.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from overnight.data.atomic_folder import is_locked_folder, staging_path
from overnight.data.loader import Batch, TokenStream
from overnight.data.shards import MANIFEST, SO_FAR, Manifest, Shard, Tokens, read_manifest, verify_shard
from overnight.data.token_reader import ShardFile, files_at_once
from overnight.terminal import echo

POLL_SECONDS = 1.0


class IncrementalFolder:
    """A folder that is being prepared, with the shards that are complete so far, each of them verified.

    Raises ValueError if there are none, or one was changed after it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: set[str] = set()
        self._open = functools.lru_cache(files_at_once())(self._reopen)
        self._growing: dict[str, ShardFile] = {}
        self.manifest, self.is_complete = self._read(self.current_path)

    def __str__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        """The current path of a shard or of the tokenizer's folder."""
        return self.current_path / name

    @property
    def current_path(self) -> Path:
        """The folder itself once it is complete, its staging folder before."""
        return self.folder if (self.folder / MANIFEST).is_file() else staging_path(self.folder)

    def refresh(self) -> None:
        """Read which shards have become complete. Raises ValueError as the constructor does."""
        path = self.current_path
        try:
            self.manifest, self.is_complete = self._read(path)
        except ValueError:
            if path == self.folder or (path / SO_FAR).is_file():
                raise
            # Else it is being renamed just now: the next call finds it.

    def read(self, shard: Shard, first: int, into: Tokens) -> None:
        """Fill `into` with the tokens of a shard from index `first` on."""
        (self._growing.get(shard.name) or self._open(shard.name)).read(first, into)

    def _read(self, path: Path) -> tuple[Manifest, bool]:
        """The manifest at `path`, once its shards are verified, and whether it is the final one."""
        is_complete = path == self.folder
        manifest = read_manifest(path, MANIFEST if is_complete else SO_FAR)
        for shard in manifest.shards():
            if shard.name not in self._verified:
                verify_shard(path, shard, manifest.vocab_size)
                self._verified.add(shard.name)
            if shard.is_growing and shard.name not in self._growing:
                # Opened now: the file is deleted when the shard has grown, but an open file stays readable.
                self._growing[shard.name] = ShardFile(path / shard.name)
        return manifest, is_complete

    def _reopen(self, name: str) -> ShardFile:
        try:
            return ShardFile(self / name)
        except ValueError:
            return ShardFile(self / name)  # the folder was renamed since


def open_incremental(folder: Path, shuffle_window: int) -> IncrementalFolder:
    """A folder that is being prepared; waits until its first rows can be read.

    Raises ValueError if they cannot, and no process prepares the folder.
    """
    needed = f"the first {2 * shuffle_window:,} training tokens of {folder}"
    if not _wait_until(lambda: has_shuffle_window(folder, shuffle_window), folder, needed):
        raise ValueError(
            f"shuffle_window={shuffle_window} needs {needed}, and no process prepares them: run its "
            "`overnight prepare` command again"
        )
    return IncrementalFolder(folder)


def has_shuffle_window(folder: Path, shuffle_window: int) -> bool:
    """True if the first shuffle window is complete, and known not to be the last one."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        return read_manifest(staging_path(folder), SO_FAR).tokens("train") >= 2 * shuffle_window
    except ValueError:  # not written yet, or just renamed
        return False


def _wait_until(
    is_ready: Callable[[], bool], folder: Path, what: str, stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Poll until `is_ready()`. False if `stopped()`, or if no process prepares `folder`."""
    is_waiting = False
    while not is_ready():
        # Checked again, since the preparation may have finished between the two checks.
        if stopped() or (not is_locked_folder(folder) and not is_ready()):
            return False
        if not is_waiting:
            echo(f"waiting for {what}")
        is_waiting = True
        time.sleep(POLL_SECONDS)
    return True


class IncrementalStream:
    """The training rows of a folder that is being prepared, of all shuffle windows but the last one."""

    def __init__(
        self, folder: IncrementalFolder, *, tokens_per_row: int, seed: int, shuffle_window: int
    ) -> None:
        self.folder, self.tokens_per_row = folder, tokens_per_row
        self._open = functools.partial(
            TokenStream, folder, tokens_per_row=tokens_per_row, seed=seed, shuffle_window=shuffle_window
        )
        self._open_again()

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows first_row, first_row + 1, ... Raises ValueError if one of them is not ready."""
        if not self.is_ready(first_row + rows):
            raise ValueError(f"row {first_row + rows} is not prepared yet in {self.folder}")
        return self._stream.batch(first_row, rows)

    def is_ready(self, rows: int) -> bool:
        """True if the first `rows` rows can be read; looks for new shards if they cannot."""
        if self._has(rows):
            return True
        self.folder.refresh()
        if self.folder.manifest is not self._stream.manifest:
            self._open_again()
        return self._has(rows)

    def wait_for(self, rows: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the first `rows` rows can be read; False if `stopped()`, or no process prepares them."""
        folder = self.folder.folder
        if _wait_until(lambda: self.is_ready(rows), folder, f"the preparation of {folder}", stopped):
            return True
        if not stopped():
            echo(
                f"the next step needs more text, and no process prepares {folder}: run its "
                "`overnight prepare` command again"
            )
        return False

    def _has(self, rows: int) -> bool:
        return self.folder.is_complete or rows <= self._stream.rows_before_last_window

    def _open_again(self) -> None:
        self._stream = self._open()
        self.tokens, self.rows_per_epoch = self._stream.tokens, self._stream.rows_per_epoch  # so far
