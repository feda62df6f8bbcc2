"""A disk that counts: every change that a run makes passes here, and one of them goes wrong.

`install` takes the place of the few functions of os, io and safetensors by which a run changes its folder:
mkdir, rename, unlink, rmdir, fsync, the making of a file, each write to one. Nothing else is touched. Of
each change it is known whether the disk has been told to keep it (fsync), so that a power cut can be played:
what was not kept is taken back, as a disk may, before the process dies. Linux only: descriptors get their
names from /proc.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutants import original, replace

WRITES = {"create", "write", "mkdir"}  # what a full disk refuses
WHERE = f"{os.sep}runs{os.sep}"


@dataclass(frozen=True)
class Fault:
    """What happens at change number `at`, counted from 1, and with `lasting` from then on."""

    at: int
    kind: str
    """kill, or torn (the process dies with half of the write done), or power (and what is not kept is lost),
    or the name of an error as in errno."""
    lasting: bool = False


@dataclass
class Disk:
    """The changes so far, and which of them a power cut would take back."""

    fault: Fault | None
    log: Path | None = None
    count: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held during a change: one happens after the other, whichever thread makes it, and none after a cut."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Of files that were written to since their last fsync: their length at that time."""
    names: set[str] = field(default_factory=set)
    """Made since the last fsync of their folder."""
    renames: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    """(old name, new name, what had the new name before), since then."""

    @contextmanager
    def change(self, what: str, path: str, torn: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Around each change of something in a run's folder; `torn` does half of it."""
        if WHERE not in path + os.sep:
            yield
            return
        with self.lock:
            self._strike(what, path, torn)
            yield

    def _strike(self, what: str, path: str, torn: Callable[[], object]) -> None:
        self.count += 1
        if self.log is not None:
            with open(self.log, "a") as file:  # noqa: PTH123 - Path.open is what is watched
                file.write(f"{what} {path.partition(WHERE)[2]}\n")
        fault = self.fault
        if fault is None or self.count < fault.at or (self.count > fault.at and not fault.lasting):
            return
        if fault.kind in {"kill", "torn", "power"}:
            if fault.kind == "torn":
                torn()
            if fault.kind == "power":
                self.lose()
            os._exit(137)
        code = getattr(errno, fault.kind)
        if code != errno.ENOSPC or what in WRITES:
            torn()
            raise OSError(code, os.strerror(code), path)

    def lose(self) -> None:
        """Take back what was not kept."""
        for path, size in self.sizes.items():
            if Path(path).is_file():
                REAL["truncate"](path, size)
        for path in self.names:
            if Path(path).is_dir():
                take_away(path)
            elif Path(path).exists():
                REAL["unlink"](path)
        for old, new, before in reversed(self.renames):
            if Path(new).exists():
                REAL["rename"](new, old)
            if before is not None and Path(new).parent.is_dir():
                with open(new, "wb") as file:  # noqa: PTH123 - as above
                    file.write(before)

    def renamed(self, old: str, new: str) -> None:
        """What is known of `old`, and of what lies in it, is known of `new`."""

        def follow(path: str) -> str:
            return new + path[len(old) :] if path == old or path.startswith(old + os.sep) else path

        self.sizes = {follow(path): size for path, size in self.sizes.items()}
        self.names = {follow(path) for path in self.names} - {new}

    def kept(self, path: str) -> None:
        """A file's bytes, or a folder's names, are on the disk."""
        self.sizes.pop(path, None)
        self.names = {name for name in self.names if os.path.dirname(name) != path}  # noqa: PTH120
        self.renames = [each for each in self.renames if os.path.dirname(each[1]) != path]  # noqa: PTH120


REAL = {
    name: getattr(os, name) for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "open", "truncate")
}


def take_away(folder: str) -> None:
    """A folder and all in it, by the real functions."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        REAL["rmdir" if path.is_dir() else "unlink"](path)
    REAL["rmdir"](folder)


def full_name(path: Any, dir_fd: int | None = None) -> str:
    """The absolute path of what os was given."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(os.path.join(base, os.fspath(path)))  # noqa: PTH118


class Pen(io.FileIO):
    """A file whose every write is counted."""

    disk: Disk
    path: str

    def write(self, data: Any) -> int:
        """Some bytes, once the disk has let them pass."""
        whole = bytes(data)
        half = whole[: len(whole) // 2]
        with self.disk.change("write", self.path, lambda: io.FileIO.write(self, half)):
            self.disk.sizes.setdefault(self.path, os.fstat(self.fileno()).st_size)
            return super().write(data) or 0


def install(fault: Fault | None = None, log: Path | None = None) -> None:
    """From here on this process's changes are counted, and `fault` happens to one of them."""
    disk = Disk(fault, log)
    watch_names(disk)
    watch_files(disk)
    target = "overnight.training.checkpoint.format:save_file"
    replace(target, watch_tensors(disk, original(target)))


def watch_names(disk: Disk) -> None:
    """mkdir, rename and replace, unlink and remove, rmdir, fsync."""

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        name = full_name(path)
        is_new = not os.path.isdir(name)  # noqa: PTH112
        with disk.change("mkdir", name) if is_new else nullcontext():
            REAL["mkdir"](path, *rest, **more)
            disk.names.add(name)

    def rename(source: Any, target: Any, **more: Any) -> None:
        old, new = full_name(source), full_name(target)
        with disk.change("rename", new):
            before = Path(new).read_bytes() if Path(new).is_file() else None
            REAL["rename"](source, target, **more)
            disk.renames.append((old, new, before))
            disk.renamed(old, new)

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        with disk.change("unlink", full_name(path, dir_fd)):
            REAL["unlink"](path, dir_fd=dir_fd)

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        with disk.change("rmdir", full_name(path, dir_fd)):
            REAL["rmdir"](path, dir_fd=dir_fd)

    def fsync(descriptor: int) -> None:
        path = full_name(descriptor)
        with disk.change("fsync", path):
            REAL["fsync"](descriptor)
            disk.kept(path)

    os.mkdir, os.rename, os.replace, os.fsync = mkdir, rename, rename, fsync
    os.unlink = os.remove = unlink
    os.rmdir = rmdir


def watch_files(disk: Disk) -> None:
    """Files that are made, and written through io.open or os.fdopen."""
    open_, fdopen = io.open, os.fdopen

    def make(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        name = full_name(path, more.get("dir_fd"))
        is_new = bool(flags & os.O_CREAT) and not os.path.exists(name)  # noqa: PTH110
        if not is_new:
            return int(REAL["open"](path, flags, *rest, **more))
        with disk.change("create", name):
            descriptor: int = REAL["open"](path, flags, *rest, **more)
            disk.names.add(name)
        return descriptor

    def watched(target: Any, mode: str) -> io.BufferedWriter:
        name = full_name(target)
        is_new = not isinstance(target, int) and not os.path.exists(name)  # noqa: PTH110
        with disk.change("create", name) if is_new else nullcontext():
            pen = Pen(target, mode.replace("b", "").replace("t", ""))
            if is_new:
                disk.names.add(name)
        pen.disk, pen.path = disk, name
        return io.BufferedWriter(pen)

    def open_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode[0] == "r" or WHERE not in full_name(path):
            return open_(path, mode, *rest, **more)
        file = watched(path, mode)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def open_descriptor(descriptor: int, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode[0] == "r" or WHERE not in full_name(descriptor):
            return fdopen(descriptor, mode, *rest, **more)
        return watched(descriptor, mode)

    os.open, io.open, os.fdopen = make, open_file, open_descriptor


def watch_tensors(disk: Disk, save: Callable[..., None]) -> Callable[..., None]:
    """Safetensors' own writing, as one write, of which any part may be done when it fails."""
    from safetensors import SafetensorError

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
        name = full_name(path)

        def half() -> None:
            save(tensors, path, metadata=metadata)
            REAL["truncate"](path, Path(path).stat().st_size // 2)

        try:
            with disk.change("write", name, half):
                disk.names.add(name)
                save(tensors, path, metadata=metadata)
                disk.sizes.setdefault(name, 0)
        except OSError as error:
            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            ) from None

    return save_file


def list_changes(log: Path) -> list[str]:
    """What a command that ran with this log has changed, in order: `write checkpoints/...` and so on."""
    return log.read_text().splitlines()


def without_fsync() -> None:
    """A mutant: nothing is ever brought to the disk; what would be is counted all the same."""
    Disk.kept = lambda *_: None  # type: ignore[method-assign]


def in_place() -> None:
    """A mutant: checkpoints are written under their final name, and believed; as most scripts do."""
    from overnight.training.checkpoint.format import checkpoint_name
    from overnight.training.checkpoint.save import publish_checkpoint, write_rank_files

    def write_in_place(snapshot: Any, building: Path, world: Any) -> str:
        final = building.with_name(checkpoint_name(snapshot.step))
        shutil.rmtree(final, ignore_errors=True)
        REAL["rename"](building, final)
        return write_rank_files(snapshot, final, world)

    def publish_in_place(snapshot: Any, building: Path, written: Any) -> None:
        publish_checkpoint(snapshot, building.with_name(checkpoint_name(snapshot.step)), written)

    replace("overnight.training.checkpoint.save:write_rank_files", write_in_place)
    replace("overnight.training.checkpoint.save:publish_checkpoint", publish_in_place)
    replace("overnight.training.checkpoint.load:verify_checkpoint", lambda *_: None)
