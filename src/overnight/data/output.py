"""A folder that appears whole or not at all: built beside its place by one process, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overnight.run_directory import flush_folder
from overnight.terminal import say

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the place of `folder` for this process; wait while another has it.

    The kernel frees the lock when its holder dies, however it dies.
    """
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` at the end; on an error it is removed.

    What a killed process left half-done is removed first. `folder` itself may be there if it is empty.
    Needs `alone`.
    """
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        flush_folder(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush_folder(folder.parent)


@contextmanager
def plain_disk_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a sentence (ValueError); other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(
                f"the disk of {folder} is full, and nothing was left behind: free some, or give another --out"
            ) from None
        if error.errno in CLOSED:
            raise ValueError(f"{error.filename or folder} may not be touched ({error.strerror})") from None
        raise


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk of `folder` has not `needed_bytes` left."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ValueError(
            f"the shards need about {needed_bytes / 1e9:,.2f} GB and the disk of {folder.parent} has "
            f"{free / 1e9:,.2f} GB free: free some, give another --out, or stop earlier with --tokens"
        )
