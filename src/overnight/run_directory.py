"""Everything a run writes, and how it is read back.

    runs/<name>/
      recipe.toml        the resolved recipe, complete
      environment.json   versions, hardware, git commit
      data.json          the manifest of the shards it was trained on
      metrics.jsonl      one line per step, exactly once
      events/            evaluations.jsonl, samples, tasks, rollbacks: keyed by step as well
      checkpoints/       step-00001000/ ...
      tokenizer/         the tokenizer of its ids
      report.html        written by `overnight report`
      ended.json         the step and the reason of its end; absent while it trains, or if it was killed
      record.json        length and digest of these files, by which a change is noticed
      unprinted.log      what could not be printed, because the terminal was closed or the disk was full
      .lock              held by the process that trains here

Whole files are replaced atomically. Line files only grow, except on resuming: then the lines after the
checkpoint's step are dropped, since those steps are computed again. JSON has no NaN and no infinity: values
that are not finite are null, for instance the gradients' norm after an overflow of float16.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from overnight.files import flush_folder, flush_to_disk, write_atomically

EVENTS = ("evaluations", "samples", "tasks", "rollbacks")
LINE_FILES = ("metrics.jsonl", *(f"events/{kind}.jsonl" for kind in EVENTS))
WHOLE_FILES = ("recipe.toml", "environment.json", "data.json", "ended.json", "compression.json")
FIRST_LINE = "# These are {} lines."  # of recipe.toml; detects a truncated file
FROM_A_COPY = "restore it from a copy of the run, or start again with another --run-name"


class RunDirectory:
    """One run's folder. Creating the object does not touch the disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.report = self.path / "report.html"
        self.ended = self.path / "ended.json"
        self.compression = self.path / "compression.json"
        self.record = self.path / "record.json"
        self.unprinted = self.path / "unprinted.log"
        self.holder = self.path / ".holder"

    def exists(self) -> bool:
        """True if a run was started here, even if its recipe is missing."""
        return self.recipe.is_file() or self.metrics.is_file()

    def begin(self, recipe: str, environment: Mapping[str, Any]) -> None:
        """Write the recipe and the environment. The recipe is written last: with it the run exists."""
        self._make()
        with self._updating_record():
            self.ended.unlink(missing_ok=True)
            write_atomically(self.environment, json.dumps(environment, indent=2) + "\n")
            write_atomically(self.recipe, FIRST_LINE.format(recipe.count("\n") + 1) + "\n" + recipe)

    def read_recipe(self) -> str:
        """The text of recipe.toml. Raises ValueError if it is missing or truncated.

        The rest of a truncated recipe is valid TOML: lost settings would silently take their defaults.
        """
        try:
            text = self.recipe.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"{self.recipe} is missing: {FROM_A_COPY}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{self.recipe} is damaged: {FROM_A_COPY}") from None
        stated = re.match(FIRST_LINE.format(r"(\d+)"), text)
        if not text.strip() or (stated is None and FIRST_LINE.startswith(text[: len("# These")])):
            raise ValueError(f"{self.recipe} is damaged: {FROM_A_COPY}")
        lines = text.count("\n")
        if stated is not None and lines < int(stated[1]):
            raise ValueError(
                f"{self.recipe} has {lines} of {stated[1]} lines: {FROM_A_COPY}; if you removed lines, "
                "remove the first one as well"
            )
        return text

    def check_record(self) -> None:
        """Raise ValueError, naming the file, if one that resuming needs is missing or damaged."""
        for path in (self.environment, self.data):
            try:
                is_table = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: {FROM_A_COPY}") from None
            except (ValueError, RecursionError):
                is_table = False
            if not is_table:
                raise ValueError(f"{path} is damaged: {FROM_A_COPY}")
        for name in LINE_FILES:
            _read_lines(self.path / name)
        # What differs in the recipe and the data is named when they are compared with those of the run.
        if problems := self.problems(ignore=("recipe.toml", "data.json")):
            raise ValueError(f"{problems[0]}: {FROM_A_COPY}")

    def problems(self, ignore: Sequence[str] = ()) -> list[str]:
        """What is missing from the run's files or was changed since, one sentence each; [] if nothing.

        Lines after the last recorded one are those of a run that trains, or that was killed. A run without
        record.json (begun by an older version, or killed while it was replaced) must have a line for each
        step of its checkpoints.
        """
        try:
            recorded = json.loads(self.record.read_text(encoding="utf-8"))
            changed = [name for name, digest in recorded.items() if not self._is_recorded(name, digest)]
        except FileNotFoundError:
            return self._missing_steps()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return [f"{self.record} is damaged"]
        return [
            f"{self.path / name} is missing, or differs from what the run wrote"
            for name in changed
            if name not in ignore
        ]

    def _missing_steps(self) -> list[str]:
        """As `problems`, by the steps of the metrics and of the newest checkpoint alone."""
        saved = sorted(path.name for path in self.checkpoints.glob("step-" + "[0-9]" * 8))
        needed = int(saved[-1].removeprefix("step-")) if saved else 0
        try:
            steps = [line["step"] for line in self.read_metrics()]
        except ValueError as error:
            return [str(error)]
        if steps == list(range(1, max(needed, len(steps)) + 1)):
            return []
        return [f"{self.metrics} lacks the lines of some of {max([needed, *steps]):,} completed steps"]

    def _is_recorded(self, name: str, digest: Mapping[str, Any]) -> bool:
        return digest == _digest(self.path / name, digest["bytes"] if name in LINE_FILES else None)

    @contextmanager
    def _updating_record(self, step: int | None = None) -> Iterator[None]:
        """Context manager for changes: record.json is absent until they are complete.

        It covers the lines up to `step`, or all of them, once they are on the disk.
        """
        if self.record.is_file():
            self.record.unlink()
            flush_folder(self.path)
        yield
        digests = {name: _digest(self.path / name) for name in WHOLE_FILES if (self.path / name).is_file()}
        for name in LINE_FILES:
            if (path := self.path / name).is_file():
                length = _length_until(path.read_bytes(), step)
                with path.open("rb") as file:
                    flush_to_disk(file.fileno())
                flush_folder(path.parent)
                digests[name] = _digest(path, length)
        write_atomically(self.record, json.dumps(digests, indent=2) + "\n")

    def record_end(self, step: int, reason: str) -> None:
        """Record the step at which the run ended, and the reason."""
        self.write(self.ended, {"step": step, "reason": reason})

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write one of the run's JSON files."""
        with self._updating_record():
            write_atomically(path, json.dumps(content, indent=2) + "\n")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one step's line; `line` holds its `step`."""
        _append(self.metrics, line)

    def append_event(self, kind: str, line: Mapping[str, Any]) -> None:
        """Add one line to events/<kind>.jsonl; kind is one of EVENTS."""
        _append(self._events(kind), line)

    def is_finished(self, total_steps: int) -> bool:
        """True once the checkpoint of the last step is published, the last thing that a run writes."""
        return (self.checkpoints / f"step-{total_steps:08d}").is_dir()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's line, in order; [] before the first. A truncated last line is left out."""
        return _read_lines(self.metrics)

    def read_events(self, kind: str) -> list[dict[str, Any]]:
        """Every line of events/<kind>.jsonl, in order; [] if there is none."""
        return _read_lines(self._events(kind))

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`; these steps are computed again."""
        with self._updating_record():
            for path in (self.path / name for name in LINE_FILES if (self.path / name).is_file()):
                kept = [line for line in _read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(map(_to_json, kept)))

    def flush(self, step: int) -> None:
        """Flush all lines to the disk, and record those up to `step`, whose checkpoint is published next."""
        with self._updating_record(step):
            pass  # the lines have been appended

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run. Raises ValueError if another process trains here, and without permission to write.

        The kernel releases the lock when the process ends, for any reason.
        """
        self._make()
        self._check_rights()
        try:  # for a second, since `is_locked` in another process holds it briefly
            held = FileLock(self.path / ".lock", timeout=1).acquire()
        except Timeout:
            raise ValueError(
                f"{self.path} is being trained by {self._holder()}; wait for it, or choose another --run-name"
            ) from None
        with held:
            write_atomically(self.holder, f"process {os.getpid()} on {socket.gethostname()}\n")
            try:
                yield
            finally:
                self.holder.unlink(missing_ok=True)

    def _holder(self) -> str:
        try:
            return self.holder.read_text(encoding="utf-8").strip() or "another process"
        except OSError:
            return "another process"

    def is_locked(self) -> bool:
        """True while a process trains here."""
        if not (self.path / ".lock").is_file():
            return False
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    def _make(self) -> None:
        """Create the folders, their names flushed to the disk. Raises ValueError if a file is in the way."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        within = (self.checkpoints, self.tokenizer, self.path / "events")
        for folder in (*within, self.path, *self.path.parents):
            # In this order: another run may create the folder between the two questions.
            if (folder.is_symlink() or folder.exists()) and not folder.is_dir():
                raise ValueError(f"{folder} is not a folder: move it away, or restore what it links to")
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            flush_folder(folder.parent)

    def _check_rights(self) -> None:
        """Raise ValueError if a file that a run writes exists and this process may not change it.

        Otherwise the first save would fail, after hours of work.
        """
        written = [self.path, self.path / ".lock", self.path / "events", self.checkpoints]
        written += self.checkpoints.glob("*step-*")  # old ones are deleted
        written += [] if (self.tokenizer / "tokenizer.json").is_file() else [self.tokenizer]
        for path in written:
            wanted = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
            if path.exists() and not os.access(path, wanted):
                raise ValueError(
                    f"{path} is not writable by this user: change its permissions (chmod, chown), "
                    "or choose another --run-name"
                )

    def _events(self, kind: str) -> Path:
        assert kind in EVENTS, kind
        return self.path / "events" / f"{kind}.jsonl"


def _digest(path: Path, length: int | None = None) -> dict[str, Any]:
    """Length and sha256 of the first `length` bytes of a file, or of all; of b"" without the file."""
    content = path.read_bytes()[:length] if path.is_file() else b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _length_until(content: bytes, step: int | None) -> int:
    """How many bytes the lines of the steps up to `step` have, or all lines."""
    lines = content.splitlines(keepends=True)
    while step is not None and lines and (lines[-1][-1:] != b"\n" or json.loads(lines[-1])["step"] > step):
        lines.pop()
    return sum(map(len, lines))


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(_to_json(line))


def _to_json(line: Mapping[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite are null."""
    return json.dumps(finite_values(line), allow_nan=False) + "\n"


def finite_values(value: Any) -> Any:
    """`value` with lists for tuples and None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite_values(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a truncated last line is left out, any other damage is an error."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
            is_whole = isinstance(values[-1]["step"], int) and line.isascii()
        except json.JSONDecodeError:
            is_whole = number == len(lines)
        except (ValueError, LookupError, TypeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{path} line {number} is damaged: {line[:60]!r}; fix it, or {FROM_A_COPY}")
    return values
