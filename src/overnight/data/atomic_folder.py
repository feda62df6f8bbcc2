"""A folder that appears whole or not at all: filled in hiding beside its place, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from overnight.data.text_files import DamagedFileError
from overnight.run_directory import flush_folder
from overnight.terminal import echo

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the place of `folder` for this process; wait while another has it.

    The kernel frees the lock when its holder dies, however it dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        echo(f"waiting for another process that prepares {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_locked_folder(folder: Path) -> bool:
    """True while some process holds the place of `folder`."""
    try:
        with FileLock(_lock_file(folder), timeout=0):
            return False
    except Timeout:
        return True


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def staging_path(folder: Path) -> Path:
    """Where `folder` is filled before it is shown."""
    return folder.parent / f".{folder.name}.partial"


def published_path(place: Path) -> Path:
    """The folder that is filled at `place`."""
    return place.parent / place.name.removeprefix(".").removesuffix(".partial")


@contextmanager
def staging_folder(folder: Path, goes_on: Callable[[Path], bool]) -> Iterator[Path]:
    """Where to fill `folder`: an empty place, or what was begun there before if `goes_on` says so.

    If the block is interrupted, or killed, what it has done stays for the next time. If it refuses
    (ValueError), nothing stays but what was begun before. Needs `exclusive`.
    """
    place = staging_path(folder)
    is_begun = goes_on(place)
    if not is_begun:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    try:
        yield place
    except ValueError:
        if not is_begun:
            shutil.rmtree(place, ignore_errors=True)
        raise


def publish_folder(folder: Path) -> None:
    """Give `folder`, filled in hiding, its name. It may be there if it is empty."""
    place = staging_path(folder)
    flush_folder(place)
    place.rename(folder)
    flush_folder(folder.parent)


@contextmanager
def plain_file_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a sentence (ValueError); other errors pass.

    A damaged file's sentence gets its remedy.
    """
    try:
        yield
    except DamagedFileError as error:
        raise ValueError(f"{error}; mend it or fetch it again, or give --on-bad-file skip") from None
    except OSError as error:
        if error.errno in FULL:
            raise ValueError(
                f"the disk of {folder} is full: free some and give the same command again, or give another "
                f"--out (what is done lies in {staging_path(folder)})"
            ) from None
        if error.errno in CLOSED:
            raise ValueError(f"{error.filename or folder} may not be touched ({error.strerror})") from None
        raise


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk of `folder` has not `needed_bytes` left."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ValueError(
            f"the shards need about {needed_bytes / 1e9:,.2f} GB and the disk of {folder.parent} has "
            f"{free / 1e9:,.2f} GB free: free some, give another --out, or stop earlier with --tokens"
        )
