"""How an environment is broken, in the folder of a trial or in the process of its command.

No means needs privileges: rights are taken away from a process that has given up those of root.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_trials import RUN
from mutants import replace

Undo = Callable[[], object]


def nothing(*_: object) -> None:
    """As it is."""


# ---------------------------------------------------------------- what breaks something in the process


def trap_disk() -> None:
    """A disk with a thousand bytes left."""
    full = shutil.disk_usage("/")._replace(free=1000)
    shutil.disk_usage = lambda _: full


def trap_memory() -> None:
    """A machine with ten thousand bytes of memory, as a container may have it that was given too few."""
    replace("overnight.hardware:find_memory_bytes", lambda _: 10_000)


def limit_memory() -> None:
    """No more than 8 GB of addresses, so that a trial that goes wrong does no harm."""
    resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9, 8 * 10**9))


def trap_writes() -> None:
    """A file system that became read-only, as after an error of the disk."""
    real_open, real_mkdir = os.open, os.mkdir

    def refuse(path: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_to_read(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and "runs" in str(path):
            refuse(path)
        return real_open(path, flags, *rest, **more)

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        if "runs" in str(path):
            refuse(path)
        real_mkdir(path, *rest, **more)

    os.open, os.mkdir = open_to_read, mkdir


def give_up_privileges() -> None:
    """From here on this process, be it root's, is refused what the rights of a file or folder refuse."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def hide_trackers() -> None:
    """No tracker is installed."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else find(name, *rest)


# ---------------------------------------------------------------- what breaks something in the folder


def without_rights(*names: str) -> Callable[[Path], Undo]:
    """These may not be written any more."""

    def damage(folder: Path) -> Undo:
        paths = [folder / name for name in names]
        modes = [path.stat().st_mode for path in paths]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def undo() -> None:
            for path, mode in zip(paths, modes, strict=True):
                path.chmod(mode)

        return undo

    return damage


def make_runs(folder: Path) -> Undo:
    """runs/ is there, empty, and may not be written."""
    (folder / "runs").mkdir()
    return without_rights("runs")(folder)


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], Undo]:
    """Something else bears the name of a folder."""

    def damage(folder: Path) -> Undo:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        make(path)
        return path.unlink

    return damage


def lead_nowhere(path: Path) -> None:
    """A link to what is not there."""
    path.symlink_to("nowhere")


def moved_away(name: str) -> Callable[[Path], None]:
    """What a link leads to is not there, as a disk that is not mounted."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / name)
        lead_nowhere(folder / name)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    """A file or folder is missing."""

    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The bytes of all files of a pattern are others."""

    def damage(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            path.write_bytes(edit(path.read_bytes()))

    return damage


def copy(source: str, name: str) -> Callable[[Path], None]:
    """One file or folder takes the place of another."""

    def damage(folder: Path) -> None:
        if (folder / source).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(folder / source, folder / name)
        else:
            shutil.copy(folder / source, folder / name)

    return damage


def half(data: bytes) -> bytes:
    """Cut off in the middle."""
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def spoilt_line(data: bytes) -> bytes:
    """The second line is no JSON."""
    first, _, rest = data.split(b"\n", 2)
    return b"\n".join([first, b'{"step": 2, "lo', rest])


def within_line(data: bytes) -> bytes:
    """Cut off within its last line."""
    return data[: data.rindex(b"=")]


def without_end(data: bytes) -> bytes:
    """Cut off in the middle, at the end of a line: what is left is a whole recipe."""
    return half(data).rpartition(b"\n")[0] + b"\n"


def high_bit(data: bytes) -> bytes:
    """A byte in the middle that no text has."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] | 128]) + data[at + 1 :]


def vouch_for_large_ids(folder: Path) -> None:
    """Ids outside the vocabulary, in shards whose manifest has the right sha256."""
    from overnight.data.shards import Manifest, Shard

    path = folder / "shards" / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256_of_the_above"]
    for shard in fields["train"]:
        file = folder / "shards" / shard["name"]
        file.write_bytes(file.read_bytes()[:-2] + b"\xff\x7f")
        shard["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    for split in ("train", "validation"):
        fields[split] = tuple(Shard(**shard) for shard in fields[split])
    path.write_text(Manifest(**fields).to_json())


def lock(folder: Path) -> Undo:
    """Another process trains there."""
    from filelock import FileLock

    held = FileLock(folder / RUN / ".lock")
    held.acquire()
    return held.release
