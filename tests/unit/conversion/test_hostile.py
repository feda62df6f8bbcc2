"""Files that would run code, fill the memory or take for ever: none of them is read, and nothing is run.

Each is opened in a process of its own that tells every audit event which running something would cause, and
whether the mark is there that each file's code leaves behind.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import time
import timeit
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.conversion.nanogpt import read_nanogpt

Write = Callable[..., Path]

# For each file a child: armed, then `read` is called with the file and an empty folder. One line each.
OPENERS = r"""
import json, os, sys, torch
from overnight.conversion import safe_unpickle

class GPTConfig: pass

def trusting(path, folder):
    torch.load(path, map_location="cpu", weights_only=False)
    return 0

def trial(path, folder, read):
    events = []
    begins = "os.", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.", "exec", "compile"
    def hook(event, words):
        if event in ("exec", "compile"):  # a module's own code is that of a file
            name = getattr(words[0], "co_filename", words[-1])
            if str(name).endswith(".py") or str(name).startswith("<frozen"):
                return
        if event.startswith(begins) and event not in ("os.listdir", "os.scandir"):
            events.append(f"{event} {words}"[:200])
    out = sys.stdout = open(folder + "/said", "w+")
    sys.addaudithook(hook)
    try:
        status = read(path, folder)
    except BaseException as error:
        status = type(error).__name__
    seen = sorted({*events})
    out.flush()
    out.seek(0)
    return {"path": path, "status": status, "said": out.read(), "events": seen}

good, folder, how, *paths = sys.argv[1:]
safe_unpickle.limit_resources, limit = lambda size: None, safe_unpickle.limit_resources
assert safe_unpickle.hand_over(good, folder) == 0  # whatever is imported lazily is there now
safe_unpickle.limit_resources = limit
for number, path in enumerate(paths):
    place = f"{folder}/{number}"
    os.mkdir(place)
    child = os.fork()
    if not child:
        told = trial(path, place, trusting if how == "trusting" else safe_unpickle.hand_over)
        with open(place + "/told", "w") as file:
            json.dump(told, file)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    told = {"path": path, "status": f"died {status}", "said": "", "events": []}
    if not status:
        told = json.load(open(place + "/told"))
    print(json.dumps({**told, "peak_bytes": used.ru_maxrss * 1024}))
"""


class Calls:
    """A pickle of it calls `function(*arguments)` when it is opened."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, Calls]:
    """By name: objects whose pickle makes the file or folder `mark` when it is opened."""
    written, touch = f"open({str(mark)!r}, 'w').close()", f"touch {mark}"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, written),
        "exec": Calls(exec, written),
        "open": Calls(open, str(mark), "w"),
        "mkdir": Calls(os.mkdir, str(mark)),
        "mkfifo": Calls(os.mkfifo, str(mark)),
        "posix_spawn": Calls(os.posix_spawn, "/bin/sh", ["sh", "-c", touch], {}),
        "spawnv": Calls(os.spawnv, os.P_WAIT, "/bin/sh", ["sh", "-c", touch]),
        "popen": Calls(os.popen, touch),
        "subprocess.call": Calls(subprocess.call, ["/bin/sh", "-c", touch]),
        "Popen": Calls(subprocess.Popen, ["/bin/sh", "-c", touch]),
        "getoutput": Calls(subprocess.getoutput, touch),
        "timeit": Calls(timeit.timeit, written, "pass", time.perf_counter, 1),
        "run_code": Calls(runpy._run_code, written, {}),  # type: ignore[attr-defined]
        "copy": Calls(shutil.copyfile, __file__, str(mark)),
        "touch": Calls(Path.touch, mark),
        "torch.save": Calls(torch.save, 1, str(mark)),
        "zip": Calls(zipfile.ZipFile, str(mark), "w"),
        "partial": Calls(functools.reduce, pow, [Calls(eval, written) or 1]),
        "nested pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
    }


def places(evil: Calls, good: dict[str, Any]) -> dict[str, Any]:
    """By name: checkpoints with `evil` somewhere in them."""
    deep: Any = evil
    for _ in range(40):
        deep = [deep]
    state = {**good["model"], "transformer.h.0.ln_1.bias": evil}
    return {
        "top": evil,
        "model": {**good, "model": evil},
        "weight": {**good, "model": state},
        "ordered": {**good, "model": collections.OrderedDict(state)},
        "optimizer": {**good, "optimizer": {"state": {0: evil}}},
        "sizes": {**good, "model_args": evil},
        "size": {**good, "model_args": {**good["model_args"], "n_head": evil}},
        "config": {**good, "config": deep},
    }


@pytest.fixture
def open_all(write: Write, tmp_path: Path) -> Callable[..., Iterator[dict[str, Any]]]:
    """`open_all(paths, "trusting" or "ours")`: what became of each file."""

    def run(paths: list[Path], how: str) -> Iterator[dict[str, Any]]:
        folder = tmp_path / how
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", "-c", OPENERS, str(write()), str(folder), how]
        ended = subprocess.run([*command, *map(str, paths)], check=True, capture_output=True, text=True)
        yield from map(json.loads, ended.stdout.splitlines())

    return run


@pytest.mark.parametrize("places_each", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_no_file_runs_code(
    write: Write, tmp_path: Path, open_all: Callable[..., Any], places_each: int
) -> None:
    """Checkpoints with a call somewhere in them: none is run, and each would have been by a pickle."""
    good = torch.load(write(), weights_only=True)
    names = [*places(Calls(id), good)]
    marks = {}
    for number, name in enumerate(payloads(tmp_path)):
        for place in [names[(number + other) % 8] for other in range(places_each)]:
            path = tmp_path / f"{number}-{place}.pt"
            marks[path] = tmp_path / f"{number}-{place}.mark"
            torch.save(places(payloads(marks[path])[name], good)[place], path)
    told = list(open_all(list(marks), "ours"))
    assert len(told) == len(marks) == 20 * places_each
    for each in told:
        assert each["status"] == 3, each  # refused
        assert each["events"] == [], each
        assert "may run code" in each["said"], each
        assert "\n" not in each["said"]
    assert not any(mark.exists() for mark in marks.values())
    # The negative control: the same files, opened as most programs open them.
    trusting = list(open_all(list(marks), "trusting"))
    time.sleep(0.5)  # Popen and posix_spawn do not wait
    assert all(mark.exists() for mark in marks.values())
    assert all(each["events"] for each in trusting)


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """An archive as torch.save's with `content` as its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        entries = {"data.pkl": content, "byteorder": b"little", "version": b"3\n", **more}
        for name, entry in entries.items():
            archive.writestr(f"archive/{name}", entry)
    return file.getvalue()


def asking_for(shape: tuple[int, ...], stride: tuple[int, ...], place: Path) -> bytes:
    """A checkpoint of which one tensor is said to have this shape and these strides."""
    state = {"transformer.wte.weight": torch.as_strided(torch.zeros(1), shape, stride)}
    torch.save({"model": state, "model_args": {"n_head": 1}}, place)
    return place.read_bytes()


def odd_files(sound: bytes, place: Path) -> dict[str, bytes]:
    """By name: files that hold no call, and are no checkpoint that could be read either."""
    legacy, deep = io.BytesIO(), b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    torch.save({"model": {"a": torch.ones(3)}}, legacy, _use_new_zipfile_serialization=False)
    doubling = b"\x80\x02]q\x00" + b"".join(b"(h" + bytes([0]) + b"h" + bytes([0]) + b"e" for _ in range(20))
    return {
        "empty": b"",
        "zeros": bytes(4096),
        "text": b"no checkpoint at all\n" * 100,
        "bare pickle": pickle.dumps({"model": 1}),
        "legacy": legacy.getvalue(),
        "no pickle": zipped(b""),
        "no stop": zipped(b"\x80\x02}q\x00"),
        "another protocol": zipped(b"\x80\x63."),
        "deep": zipped(deep),
        "doubling": zipped(doubling + b"."),
        "a length that lies": zipped(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"short."),
        "a number that lies": zipped(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
        "a tuple of nothing": zipped(b"\x80\x02\x85."),
        "unknown codes": zipped(b"\x80\x02\xff\xfe\xfd."),
        "an escape": zipped(b"\x80\x02c\x1b[2Jos\nsys\x07tem\n."),
        "zip bomb": zipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/0": bytes(200_000_000)}),
        "bzip": zipped(b"\x80\x02}.", zipfile.ZIP_BZIP2),
        "lzma": zipped(b"\x80\x02}.", zipfile.ZIP_LZMA),
        "zip in a zip": zipped(sound),
        "a tensor of a petabyte": asking_for((2**25, 2**25), (0, 0), place),
        "a tensor of 40 GB": asking_for((10**5, 10**5), (0, 0), place),
        "a tensor of 300 MB": asking_for((10**4, 7_500), (0, 0), place),
        "two ends": sound + sound[-200:],
    }


def test_odd_files_are_refused(
    write: Write, tmp_path: Path, open_all: Callable[..., Iterator[dict[str, Any]]]
) -> None:
    """With what each process may take: no file fills the memory, or takes longer than a moment."""
    sound = write().read_bytes()
    content = odd_files(sound, tmp_path / "asking.pt")
    paths = []
    for number, damaged in enumerate(content.values()):
        paths.append(tmp_path / f"odd-{number}.pt")
        paths[-1].write_bytes(damaged)
    started_at = time.monotonic()
    told = dict(zip(content, open_all(paths, "ours"), strict=True))
    assert time.monotonic() - started_at < 60
    for name, each in told.items():
        assert each["status"] == 3, (name, each)
        assert each["events"] == [], (name, each)
        assert each["said"].isprintable(), name
        assert each["peak_bytes"] < 2e9, name  # torch itself has some 300 MB of it


def check_damage(write: Write, tmp_path: Path, open_all: Callable[..., Any], trials: int) -> None:
    """Cut short, or with one bit turned: refused, or (where a bit says nothing) read as what it was.

    The control: torch's reader alone takes some of them for another model.
    """
    sound, draw = write().read_bytes(), random.Random(0)
    read_nanogpt(write())
    paths = []
    for number in range(trials):
        damaged = bytearray(sound)
        if number % 4:
            bit = draw.randrange(8 * len(sound))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            del damaged[draw.randrange(len(sound)) :]
        paths.append(tmp_path / f"damaged-{number}.pt")
        paths[-1].write_bytes(damaged)
    told = list(open_all(paths, "ours"))
    assert len(told) == trials
    assert {each["status"] for each in told} <= {0, 3}
    assert all(each["events"] == [] for each in told)
    folder = tmp_path / "ours"
    whole = (folder / "tensors.safetensors").read_bytes()
    for number, each in enumerate(told):
        if each["status"] == 0:
            assert (folder / str(number) / "tensors.safetensors").read_bytes() == whole
    refused = [Path(each["path"]) for each in told if each["status"] == 3]
    silent = sum(is_taken_for_another(path, sound) for path in refused)
    sys.stdout.write(
        f"{trials} damaged, {len(refused)} refused, {silent} of them silently another model to torch"
    )
    assert silent > trials // 10


def is_taken_for_another(path: Path, sound: bytes) -> bool:
    """True if torch's reader of weights opens the file, and finds other weights in it."""
    right = torch.load(io.BytesIO(sound), weights_only=True)["model"]
    try:
        found = torch.load(path, weights_only=True)["model"]
        return not all(torch.equal(found[name], right[name]) for name in right)
    except Exception:
        return False


def test_damage_is_refused_or_changes_nothing(
    write: Write, tmp_path: Path, open_all: Callable[..., Any]
) -> None:
    check_damage(write, tmp_path, open_all, 60)


@pytest.mark.slow
def test_damage_is_refused_or_changes_nothing_a_thousand_times(
    write: Write, tmp_path: Path, open_all: Callable[..., Any]
) -> None:
    check_damage(write, tmp_path, open_all, 1000)


def test_a_user_is_told_in_one_sentence(write: Write, tmp_path: Path) -> None:
    """All the way through the child."""
    path = write(config=Calls(eval, f"open({str(tmp_path / 'mark')!r}, 'w').close()"))
    with pytest.raises(ValueError, match=r"ckpt\.pt is not read: it asks for .*eval, which may run") as error:
        read_nanogpt(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists()


def test_the_child_has_little_memory(write: Write, tmp_path: Path) -> None:
    """The limit by itself: a child that would take more than the file explains ends without it."""
    limited = (
        "import sys, torch; from overnight.conversion import safe_unpickle; safe_unpickle.limit_resources(1000);"
        "sys.stdout.write('limited'); sys.stdout.flush(); torch.zeros(2 << 30, dtype=torch.uint8)"
    )
    if not Path("/proc/self/statm").is_file():
        pytest.skip("this system knows no limit of memory")
    ended = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert ended.stdout == "limited"
    assert ended.returncode != 0
    assert "memory" in ended.stderr
