"""Hostile .pt files (code, memory, time): all are refused, and no code is run.

The program open_hostile.py reads them and records the audit events which running code causes; the code of
each file would also leave a mark behind.
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
import struct
import subprocess
import sys
import time
import timeit
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

Write = Callable[..., Path]
OpenAll = Callable[..., list[dict[str, Any]]]


class Calls:
    """Its pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, Calls]:
    """By name: objects whose pickle creates the file or folder `mark` when it is loaded."""
    written, touch = f"open({str(mark)!r}, 'w').close()", f"touch {mark}"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, written),
        "exec": Calls(exec, written),
        "open": Calls(open, str(mark), "w"),
        "mkdir": Calls(os.mkdir, str(mark)),
        "posix_spawn": Calls(os.posix_spawn, "/bin/sh", ["sh", "-c", touch], {}),
        "Popen": Calls(subprocess.Popen, ["/bin/sh", "-c", touch]),
        "timeit": Calls(timeit.timeit, written, "pass", time.perf_counter, 1),
        "run_code": Calls(runpy._run_code, written, {}),  # type: ignore[attr-defined]
        "touch": Calls(Path.touch, mark),
        "torch.save": Calls(torch.save, 1, str(mark)),
        "partial": Calls(functools.reduce, pow, [Calls(eval, written) or 1]),
        "nested pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
    }


def checkpoints_with(evil: Calls, good: dict[str, Any]) -> dict[str, Any]:
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
def open_all(write: Write, tmp_path: Path) -> OpenAll:
    """`open_all(contents or paths, "trusting" or "ours")`: the result of each file."""

    def run(files: Sequence[bytes | Path], how: str = "ours") -> list[dict[str, Any]]:
        folder = tmp_path / how
        folder.mkdir()
        paths = []
        for number, each in enumerate(files):
            paths.append(each if isinstance(each, Path) else tmp_path / f"file-{number}.pt")
            if isinstance(each, bytes):
                paths[-1].write_bytes(each)
        program = Path(__file__).with_name("open_hostile.py")
        command = [sys.executable, "-W", "ignore", program, write(), folder, how, *paths]
        ended = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        return [json.loads(line) for line in ended.stdout.splitlines()]

    return run


@pytest.mark.parametrize("positions", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_hostile_pickle_runs_no_code(write: Write, tmp_path: Path, open_all: OpenAll, positions: int) -> None:
    """Checkpoints with a call somewhere in them."""
    good = torch.load(write(), weights_only=True)
    names = [*checkpoints_with(Calls(id), good)]
    marks = {}
    for number, name in enumerate(payloads(tmp_path)):
        for position in [names[(number + other) % 8] for other in range(positions)]:
            path = tmp_path / f"{number}-{position}.pt"
            marks[path] = path.with_suffix(".mark")
            torch.save(checkpoints_with(payloads(marks[path])[name], good)[position], path)
    results = open_all(list(marks))
    assert len(results) == len(marks) == 13 * positions
    for each in results:
        assert each["status"] == 3, each  # refused
        assert each["events"] == [], each
        assert "may run code" in each["output"], each
        assert "\n" not in each["output"]
    assert not any(mark.exists() for mark in marks.values())
    # The negative control: the same files, loaded with weights_only=False.
    assert all(each["events"] for each in open_all(list(marks), "trusting"))
    for _ in range(6000):  # Popen and posix_spawn do not wait
        if all(mark.exists() for mark in marks.values()):
            break
        time.sleep(0.01)
    assert all(mark.exists() for mark in marks.values())


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """An archive as torch.save writes it, with `content` as its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        entries = {"data.pkl": content, "byteorder": b"little", "version": b"3\n", **more}
        for name, entry in entries.items():
            archive.writestr(f"archive/{name}", entry)
    return file.getvalue()


def strided(rows: int, columns: int) -> bytes:
    """A checkpoint with one tensor of this shape over a single number."""
    file, tensor = io.BytesIO(), torch.as_strided(torch.zeros(1), (rows, columns), (0, 0))
    torch.save({"model": {"transformer.wte.weight": tensor}, "model_args": {"n_head": 1}}, file)
    return file.getvalue()


def malformed_files(valid: bytes) -> dict[str, bytes]:
    """By name: files without calls that are not valid checkpoints either."""
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
        "wrong length": zipped(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"short."),
        "wrong number": zipped(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
        "empty tuple": zipped(b"\x80\x02\x85."),
        "unknown codes": zipped(b"\x80\x02\xff\xfe\xfd."),
        "escape code": zipped(b"\x80\x02c\x1b[2Jos\nsys\x07tem\n."),
        "zip bomb": zipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/0": bytes(200_000_000)}),
        "bzip": zipped(b"\x80\x02}.", zipfile.ZIP_BZIP2),
        "lzma": zipped(b"\x80\x02}.", zipfile.ZIP_LZMA),
        "zip in a zip": zipped(valid),
        "a tensor of a petabyte": strided(2**25, 2**25),
        "a tensor of 40 GB": strided(10**5, 10**5),
        "a tensor of 300 MB": strided(10**4, 7_500),
        "two ends": valid + valid[-200:],
    }


def test_malformed_file_is_refused(write: Write, open_all: OpenAll) -> None:
    contents = malformed_files(write().read_bytes())
    results = open_all(list(contents.values()))
    for name, each in zip(contents, results, strict=True):
        assert each["status"] == 3, (name, each)
        assert each["events"] == [], (name, each)
        assert each["output"].isprintable(), name
        assert each["peak_bytes"] < 2e9, name  # torch itself takes 300 MB


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_file_is_refused_or_unchanged(
    write: Write, tmp_path: Path, open_all: OpenAll, trials: int
) -> None:
    """Files cut short, or with one bit flipped: refused, or (where a bit has no meaning) read unchanged.

    The negative control: torch's reader alone silently reads another model from some of them.
    """
    valid, draw = write().read_bytes(), random.Random(0)
    contents = []
    for number in range(trials):
        damaged = bytearray(valid)
        if number % 4:
            bit = draw.randrange(8 * len(valid))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            del damaged[draw.randrange(len(valid)) :]
        contents.append(bytes(damaged))
    results = open_all(contents)
    assert len(results) == trials
    whole = (tmp_path / "ours" / "tensors.safetensors").read_bytes()
    for number, each in enumerate(results):
        assert each["status"] in {0, 3}
        assert each["events"] == []
        if each["status"] == 0:
            assert (tmp_path / "ours" / str(number) / "tensors.safetensors").read_bytes() == whole
    refused = [Path(each["path"]) for each in results if each["status"] == 3]
    assert sum(reads_other_weights(path, valid) for path in refused) > trials // 10


def reads_other_weights(path: Path, valid: bytes) -> bool:
    """True if torch's weights-only reader loads the file, with other weights."""
    right = torch.load(io.BytesIO(valid), weights_only=True)["model"]
    try:
        found = torch.load(path, weights_only=True)["model"]
        return not all(torch.equal(found[name], right[name]) for name in right)
    except Exception:
        return False


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="this system has no limit of memory")
def test_child_memory_is_limited() -> None:
    program = (
        "import sys, torch; from overnight.conversion import safe_unpickle\n"
        "safe_unpickle.limit_resources(1000); sys.stdout.write('limited'); sys.stdout.flush()\n"
        "torch.zeros(2 << 30, dtype=torch.uint8)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout == "limited"
    assert ended.returncode != 0
    assert "memory" in ended.stderr
