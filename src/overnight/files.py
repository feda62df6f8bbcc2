"""Files that are whole after a crash, and the cache."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
import tempfile
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash, and for any reader, it is the old file or the new one.

    Raises ValueError for a device or a pipe, in whose place there would be a file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a device or a pipe: give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("xb") as file:  # with the permissions of the umask, unlike a file of tempfile
            file.write(data)
            file.flush()  # fsync does not see Python's own buffer
            flush_to_disk(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)  # a write that fails names no file
        raise
    flush_folder(path.parent)


def apply_umask(path: Path) -> None:
    """Give a file that a library created as private (0600) the permissions of any new file."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def flush_to_disk(descriptor: int) -> None:
    """Wait until this file's bytes are on the disk (fsync)."""
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` (a rename, a new file) to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- cache


def cache_path(*names: str) -> Path:
    """A file or folder of the cache, `$XDG_CACHE_HOME/overnight` or `~/.cache/overnight`; not created here.

    The cache only makes things faster. Where it can't be written to (a read-only home, or none), a file that
    is in it is still read; all else goes into the folder for temporary files, with one warning.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # the specification has relative ones ignored
        root = Path(os.path.expanduser("~"), ".cache")  # noqa: PTH111 - no error without a home
    path = root.joinpath("overnight", *names)
    if root.is_absolute() and (os.access(path, os.R_OK) and path.is_file() or _can_be_written(path)):
        return path
    return _temporary_cache(root / "overnight").joinpath(*names)


def _can_be_written(path: Path) -> bool:
    """True if `path`, or else the lowest folder above it that exists, is a folder with the right to write."""
    lowest = next(folder for folder in (path, *path.parents) if os.access(folder, os.F_OK))
    return lowest.is_dir() and os.access(lowest, os.W_OK | os.X_OK)


@functools.cache
def _temporary_cache(instead_of: Path) -> Path:
    folder = Path(tempfile.gettempdir(), f"overnight-{os.getuid()}")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may listen
        sys.stderr.write(f"overnight: {instead_of} can't be written to; the cache is in {folder}\n")
    return folder
