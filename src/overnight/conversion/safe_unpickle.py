"""The tensors of a .pt file, which is a pickle: whoever wrote it may have it do anything when it is opened.

So it is read by a process of its own, which has little memory and time, and there by torch's reader of
weights alone, which knows tensors, numbers and texts, and calls nothing else that the file may name. What
comes back is a safetensors file, which can do nothing.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFE_READER = (2, 10)  # before, a file could make the reader of weights write beside its memory
REFUSED = 3
SECONDS, BYTES_PER_SECOND = 60, 20e6  # for the file that takes longest, on a slow disk
SPARE_BYTES = 1 << 30
TENSORS = "tensors.safetensors"
PROGRAM = "import sys; from overnight.conversion import safe_unpickle; sys.exit(safe_unpickle.hand_over(*sys.argv[1:]))"
# Where build-nanogpt's class of sizes may have stood when a file was written.
NAMES_OF_SIZES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")
SIZES = frozenset({"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias"})


class Pickled(NamedTuple):
    """What was found in a file."""

    weights: dict[str, Tensor]
    """The tensors below "model", by their names there."""
    sizes: dict[str, int]
    """What stands below "model_args" (nanoGPT) or "config" (build-nanogpt) of a model's size."""
    is_nanogpt: bool
    """True of nanoGPT's own files, which call the sizes model_args."""


class Sizes:
    """Stands for build-nanogpt's GPTConfig: takes its fields, and has no code."""


def read_pickled(path: Path) -> Pickled:
    """The weights and sizes in a file, read in a child process.

    Raises ValueError, one sentence, for a file that holds anything but tensors, numbers and texts, that is
    damaged, or that takes more memory or time than its size explains.
    """
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="overnight-") as folder:
        command = [sys.executable, "-P", "-c", PROGRAM, str(path.absolute()), folder]
        try:
            ended = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_seconds(size),
                check=False,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path} is not read: it takes longer than its size explains") from None
        if ended.returncode == REFUSED:
            raise ValueError(f"{path} is not read: {ended.stdout.decode(errors='replace')}")
        try:
            return _read_tensors(Path(folder) / TENSORS)
        except (FileNotFoundError, SafetensorError):
            raise ValueError(
                f"{path} is not read: the process that opened it ended with status {ended.returncode}; it is "
                "damaged, or takes more memory or time than its size explains"
            ) from None


def _read_tensors(path: Path) -> Pickled:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return Pickled(weights, **about)


def _seconds(size: int) -> float:
    return SECONDS + size / BYTES_PER_SECOND


def hand_over(path: str, folder: str) -> int:
    """What the child does: read the file, and write its tensors into `folder`. Returns its exit status.

    Why a file is refused goes to standard output.
    """
    try:
        limit_resources(Path(path).stat().st_size)
        found = _read_pickle(Path(path))
        about = {"sizes": found.sizes, "is_nanogpt": found.is_nanogpt}
        save_file(found.weights, Path(folder) / TENSORS, metadata={"about": json.dumps(about)})
    except (ValueError, MemoryError) as error:
        sys.stdout.write(str(error) or "it takes more memory than its size explains")
        return REFUSED
    return 0


def limit_resources(size: int) -> None:
    """From here on: memory for some copies of the file, time for some readings, files of its size.

    macOS knows no such limit of memory.
    """
    torch.set_num_threads(1)  # each thread would take memory for itself
    limits = {resource.RLIMIT_CPU: int(_seconds(size)), resource.RLIMIT_FSIZE: size + SPARE_BYTES}
    taken = Path("/proc/self/statm")
    if taken.is_file():
        pages = int(taken.read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + 4 * size + SPARE_BYTES
    for limit, most in {**limits, resource.RLIMIT_CORE: 0}.items():
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))


def _read_pickle(path: Path) -> Pickled:
    """Raises ValueError with what is wrong, without the path."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_READER:
        raise ValueError(f"that needs torch 2.10 or newer, and this is {torch.__version__}")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(Sizes, name) for name in NAMES_OF_SIZES]):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(str(error))) from None
    except Exception as error:  # a hostile file may bring the reader to any
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    if type(found) is not dict or not isinstance(found.get("model"), dict):
        raise ValueError('it is no checkpoint of nanoGPT\'s: it holds no table called "model"')
    is_nanogpt = "model_args" in found
    sizes = found["model_args"] if is_nanogpt else found.get("config")
    return Pickled(_weights(found["model"], path.stat().st_size), _sizes(sizes), is_nanogpt)


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is what torch.save writes: whole, and nothing in it compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if is_packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("it unpacks to more than it is, which no file of torch.save's does")
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        raise ValueError("it is cut short, damaged, or not written by torch.save (1.6 or newer)") from None
    if damaged is not None:
        raise ValueError("it is damaged: its content is not what its checksums say")


def _refusal(said: str) -> str:
    """In one sentence what torch's reader of weights says in many, and what the file named."""
    named = re.search(r"GLOBAL (\S+)", said)
    what = re.sub(r"[^\w.]", "?", named[1])[:100] if named else "something"
    return f"it asks for {what}, which may run code; only tensors, numbers and texts are read"


def _weights(model: dict[Any, Any], size: int) -> dict[str, Tensor]:
    tensors = {name: value for name, value in model.items() if type(value) is Tensor}
    if len(tensors) < len(model) or not all(isinstance(name, str) for name in tensors):
        raise ValueError('what it calls "model" holds more than named tensors')
    if not all(each.layout == torch.strided and each.device.type == "cpu" for each in tensors.values()):
        raise ValueError('what it calls "model" holds tensors of another kind than weights are')
    if sum(each.nbytes for each in tensors.values()) > 2 * size:  # the head and the embedding are one
        raise ValueError("its tensors are larger than the file")
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _sizes(found: Any) -> dict[str, int]:
    given = vars(found) if type(found) is Sizes else found
    if not isinstance(given, dict):
        raise ValueError("it is no checkpoint of nanoGPT's: neither model_args nor config says its sizes")
    sizes = {name: value for name, value in given.items() if name in SIZES}
    if not all(type(value) in {int, bool} for value in sizes.values()):
        raise ValueError("a size in it is not a whole number")
    return sizes
