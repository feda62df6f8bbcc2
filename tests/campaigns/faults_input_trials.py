"""A trial of input: a command in a process of its own, what it said and left, and what is wrong with that."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from faults_trials import DONE, FAILED, PROCESSES, RECIPE, SETTINGS, WRONG_USE, run

SECONDS_AT_MOST = 40.0
CRASHED = -1
PYTHONS_WORDS = re.compile(
    r"Traceback|NoneType|invalid literal|could not convert|unhashable|object is not|object has no|: \[Errno"
    r"|embedded null|codec can't|not supported between|takes \d+ positional|[a-z]Error\b|Warning:"
)


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    """Its exit status; CRASHED if it raised an error, a signal's number negated if it was killed."""
    out: str
    """Standard output."""
    said: str
    """Standard error."""
    left: tuple[str, ...]
    """Files and folders that are new or changed."""
    captured: Any = None
    """What `arrange` has made the command return."""


Judge = Callable[[Path, Outcome], "str | None"]


def accept(_folder: Path, _outcome: Outcome) -> str | None:
    """No reference."""
    return None


class Trial(NamedTuple):
    """A command, and what it is judged by."""

    words: tuple[str, ...]
    arrange: Callable[[Path], object] = lambda _: None
    """In the process of the trial, before the command: writes files, sets variables. What it returns is
    called after the command: its result becomes `captured`."""
    judge: Judge = accept
    """What differs from the reference, for every outcome that is not faulty in itself; None if nothing."""
    may_fail: bool = False
    """True if status 1 is documented: a failed check, a loss that is not finite, an error of the disk."""
    may_last: bool = False
    """True if a larger amount of work was asked for: the limit of time is then no fault."""
    seconds: float = SECONDS_AT_MOST
    """The limit of time."""
    is_fresh: bool = False
    """True for a new interpreter, for the variables that Python reads when it starts."""


def make_ground(folder: Path, text: Path) -> Path:
    """What every trial begins with: a text, its shards, a recipe, a finished run, a Hugging Face folder."""
    folder.mkdir()
    shutil.copytree(text, folder / "text")
    recipe = RECIPE.format(**SETTINGS | {"steps": 4, "tokens_per_step": 128, "rows": 2}, shards="shards")
    (folder / "small.toml").write_text(recipe)
    (folder / "prompts.txt").write_text("Line 1 tells\nLine 2\n")
    (folder / "tasks").mkdir()
    for command in (
        "prepare text --tokenizer bpe-300 --out shards --workers 1 --validation-fraction 0.2",
        "train small.toml",
        "convert runs/small --to hf --out hf",
    ):
        run(_must_work, folder, command.split())
    shutil.rmtree(folder / "tasks")
    return folder


def _must_work(folder: Path, words: list[str]) -> None:
    from overnight.cli import main

    os.chdir(folder)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        sys.exit(main(words))


class Bench:
    """A copy of the ground where trials are made, one after another; made anew when one has changed it."""

    def __init__(self, ground: Path, folder: Path) -> None:
        self.ground, self.folder = ground, folder
        self.place = folder / "outer" / "place"
        (folder / "cache").mkdir(parents=True)
        self._renew()

    def _renew(self) -> None:
        if self.place.parent.exists():
            _allow(self.place.parent)
            shutil.rmtree(self.place.parent)
        self.place.parent.mkdir()
        shutil.copytree(self.ground, self.place, symlinks=True)
        self.pristine = list_state(self.place.parent)

    def try_out(self, trial: Trial, mutant: Callable[[], object] | None = None) -> tuple[Outcome, str | None]:
        """The outcome of a trial, and what is wrong with it."""
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_play, args=(trial, self.folder, sender, mutant))
        process.start()
        sender.close()
        if receiver.poll(trial.seconds):
            try:
                outcome, wrong = receiver.recv()
            except EOFError:
                process.join()
                outcome, wrong = self._killed(process.exitcode or 0), "the process has died"
        else:
            process.kill()
            outcome = self._killed(-signal.SIGKILL)
            wrong = None if trial.may_last else f"no end within the limit of time: {outcome.said[-3000:]}"
        process.join()
        process.close()
        if list_state(self.place.parent) != self.pristine:
            self._renew()
        return outcome, wrong

    def _killed(self, status: int) -> Outcome:
        out, said = ((self.folder / name).read_text(errors="replace") for name in ("out", "said"))
        return Outcome(status, out, said, ())


def _allow(folder: Path) -> None:
    """Give back the rights that a trial has taken."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def list_state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Of each file and folder its kind and rights, size and time."""
    found = {}
    for path, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            full = os.path.join(path, name)  # noqa: PTH118 - bytes
            about = os.lstat(full)
            is_file = not os.path.isdir(full)  # noqa: PTH112 - bytes
            key = os.fsdecode(os.path.relpath(full, os.fsencode(folder)))
            found[key] = (about.st_mode, about.st_size * is_file, about.st_mtime_ns * is_file)
    return found


def _play(trial: Trial, folder: Path, sender: Any, mutant: Callable[[], object] | None) -> None:
    """In the process of a trial."""
    import resource

    place = folder / "outer" / "place"
    for descriptor, name in ((1, "out"), (2, "said")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: PTH123, SIM115 - multiprocessing closed it
    resource.setrlimit(resource.RLIMIT_AS, (12 * 10**9, 12 * 10**9))
    faulthandler.dump_traceback_later(0.9 * trial.seconds, file=2)
    os.chdir(place)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "cache")}
    if mutant is not None:
        mutant()
    capture = trial.arrange(place)
    before = list_state(place.parent)
    stop_writing_outside(folder)
    status = _start(trial.words) if trial.is_fresh else _call(trial.words)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):
                stream.flush()
    os.chdir(place)
    after = list_state(place.parent)
    left = tuple(sorted(name for name in {*before, *after} if before.get(name) != after.get(name)))
    out, said = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "said"))
    outcome = Outcome(status, out, said, left, capture() if callable(capture) else None)
    wrong = find_wrong(trial, outcome)
    if wrong is None:
        try:
            wrong = trial.judge(place, outcome)
        except Exception:  # noqa: BLE001 - of the reference, or of the judge
            wrong = f"the judge failed: {traceback.format_exc()[-700:]}"
    sender.send((outcome._replace(captured=None), wrong))
    sender.close()
    os._exit(0)


def stop_writing_outside(folder: Path) -> None:
    """From here on what lies outside of the folder is refused, as to a user without privileges."""
    inside = os.fsencode(os.path.realpath(folder))
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}

    def watch(event: str, given: Any) -> None:
        paths = given[:2] if event in {"os.rename", "os.link"} else given[:1]
        if event == "open":
            if not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or isinstance(given[0], int):
                return
        elif event not in changes:
            return
        for path in paths:
            full = os.path.realpath(os.fsencode(path))
            if not full.startswith((inside, b"/dev/null", b"/dev/full", b"/tmp/", b"/proc/self")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    sys.addaudithook(watch)


def _start(words: tuple[str, ...]) -> int:
    return subprocess.run([sys.executable, "-m", "overnight", *words], check=False).returncode


def _call(words: tuple[str, ...]) -> int:
    from overnight.cli import main
    from overnight.distributed.launcher import open_missing_streams

    try:
        open_missing_streams()
        return main(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:  # noqa: BLE001 - that is what is looked for
        traceback.print_exc()
        return CRASHED


def find_wrong(trial: Trial, outcome: Outcome) -> str | None:
    """What is wrong with an outcome in itself: an error that escaped, no sentence, something left behind."""
    lines = [line for line in outcome.said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if outcome.status == CRASHED or "Traceback" in outcome.said:
        return f"traceback: {last}"
    if outcome.status not in {DONE, FAILED, WRONG_USE}:
        return f"status {outcome.status}"
    if outcome.status == DONE:
        return None
    if outcome.status == FAILED and not trial.may_fail:
        return f"status 1: {last}"
    return _find_wrong_refusal(outcome, last)


def _find_wrong_refusal(outcome: Outcome, last: str) -> str | None:
    if outcome.status == WRONG_USE and not re.match(r"overnight: .{15,}", last):
        return f"no sentence: {last}"
    if outcome.status == WRONG_USE and (found := PYTHONS_WORDS.search(last)):
        return f"Python's words ({found[0]}): {last}"
    left = [name for name in outcome.left if not re.search(r"(^|/)\.[^/]*\.lock$", name)]  # documented
    if left:
        return f"leftover: {', '.join(left[:4])} ({last})"
    return None


def damage(data: bytes, draw: random.Random) -> bytes:
    """The bytes, changed in one place or as a whole."""
    at, length = draw.randrange(len(data) + 1), draw.randrange(1, 20)
    kind = draw.randrange(9)
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + bytes(length) + data[at:]
    if kind == 4:
        return data[:at] + draw.randbytes(length) + data[at:]
    if kind == 5:
        return data.replace(b"\n", draw.choice((b"\r\n", b"\r", b"\n\n", b"")))
    if kind == 6:
        return draw.choice((b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2, b"\xff\xfe", b"\0", b"\n\n")) + data
    if kind == 7:
        return data.decode(errors="replace").encode(
            draw.choice(("utf-16", "utf-32", "utf-16-le", "latin-1")), "replace"
        )
    return b"" if draw.random() < 0.3 else data + draw.choice((b"\0", b"\xff", b"{", b"\x1a", data[:at]))
