"""A folder that is written to a staging folder next to it, then renamed: it exists complete or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from overnight.data.text_files import DamagedFileError
from overnight.files import flush_folder
from overnight.terminal import byte_size, echo

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; wait while another process holds it.

    The kernel releases the lock when the process ends, also if it is killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if is_locked_folder(folder):
        echo(f"waiting for another process that prepares {folder}")
    with lock_of(folder):
        yield


def is_locked_folder(folder: Path) -> bool:
    """True while a process holds the lock of `folder`."""
    try:
        with lock_of(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def lock_of(path: Path) -> FileLock:
    """The lock of a folder or file; entering it waits while another process holds it."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def staging_path(folder: Path) -> Path:
    """The staging folder of `folder`."""
    return folder.parent / f".{folder.name}.partial"


def published_path(staging: Path) -> Path:
    """The published folder of a staging folder."""
    return staging.parent / staging.name.removeprefix(".").removesuffix(".partial")


@contextmanager
def staging_folder(folder: Path, can_resume: Callable[[Path], bool]) -> Iterator[Path]:
    """The staging folder: that of an earlier process if `can_resume` accepts it, otherwise empty.

    An interrupted or killed block leaves its files for the next time. A block that raises ValueError leaves
    only files that were there before. Must be called within `exclusive`.
    """
    staging = staging_path(folder)
    is_resumed = can_resume(staging)
    if not is_resumed:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        yield staging
    except ValueError:
        if not is_resumed:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def publish_folder(folder: Path) -> None:
    """Rename the staging folder to `folder`, which may exist if it is empty."""
    staging = staging_path(folder)
    flush_folder(staging)
    staging.rename(folder)
    flush_folder(folder.parent)


@contextmanager
def plain_file_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing permissions and damaged input files into ValueErrors that name the remedy."""
    try:
        yield
    except DamagedFileError as error:
        raise ValueError(f"{error}; repair it or fetch it again, or give --on-bad-file skip") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ValueError(
                f"the disk of {folder} is full: free some and run the same command again, or give another "
                f"--out (the finished part is in {staging_path(folder)})"
            ) from None
        if error.errno in NOT_WRITABLE:
            raise ValueError(f"{error.filename or folder} cannot be accessed ({error.strerror})") from None
        raise


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ValueError(
            f"the shards need about {byte_size(needed_bytes)} and the disk of {folder.parent} has "
            f"{byte_size(free)} free: free some space, give another --out, or stop earlier with --tokens"
        )
