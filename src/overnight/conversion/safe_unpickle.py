"""Read the tensors of a .pt file without trusting it: a .pt file is a pickle, which can run any code.

The file is read by a child process with limited memory and time, and there by torch's weights-only reader,
which knows tensors, numbers and texts, and calls nothing else that the file names. The child returns a
safetensors file, which cannot run code.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from overnight.config import require_readable

SAFE_TORCH = (2, 10)  # in older versions a file could make the weights-only reader write out of bounds
REFUSED = 3  # exit status of the child
SECONDS, BYTES_PER_SECOND = 60, 20e6  # time limit: for any file, and for its size on a slow disk
SPARE_BYTES = 1 << 30
TENSORS = "tensors.safetensors"
PROGRAM = (
    "import sys; from overnight.conversion import safe_unpickle; "
    "from overnight.distributed.launcher import end_with_parent; end_with_parent(int(sys.argv[1])); "
    "sys.exit(safe_unpickle.convert_in_child(*sys.argv[2:]))"
)
CONFIG_CLASSES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")  # where build-nanogpt defines its config
# What a NumPy number is pickled as, for example a validation loss that is stored with the weights.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    (np.dtype, "numpy.dtype"),
    *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in "efdbhilqBHILQ?"),
]
SIZE_NAMES = frozenset({"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias"})


class PickledCheckpoint(NamedTuple):
    """The contents of a file."""

    weights: dict[str, Tensor]
    """The tensors of its "model", by their names there."""
    sizes: dict[str, int]
    """Model sizes from "model_args" (nanoGPT) or "config" (build-nanogpt)."""
    is_nanogpt: bool
    """True if the sizes come from "model_args"."""


class PickledConfig:
    """Replaces build-nanogpt's GPTConfig while unpickling: takes its fields, and has no code."""


def read_pickled(path: Path) -> PickledCheckpoint:
    """The weights and sizes of a file, read in a child process.

    Raises ValueError for a file that contains more than tensors, numbers and texts, is damaged, or needs
    more memory or time than a file of its size should.
    """
    require_readable(path)
    size = path.stat().st_size
    with tempfile.TemporaryDirectory(prefix="overnight-") as folder:
        command = [sys.executable, "-P", "-c", PROGRAM, str(os.getpid()), str(path.absolute()), folder]
        try:
            child = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_time_limit(size),
                check=False,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path} is refused: reading it takes too long for its size") from None
        if child.returncode == REFUSED:
            raise ValueError(f"{path} is refused: {child.stdout.decode(errors='replace')}")
        try:
            with safe_open(Path(folder) / TENSORS, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return PickledCheckpoint(weights, **about)
        except (FileNotFoundError, SafetensorError):
            raise ValueError(
                f"{path} is refused: the process reading it ended with status {child.returncode}; the file "
                "is damaged, or needs too much memory or time for its size"
            ) from None


def _time_limit(size: int) -> float:
    return SECONDS + size / BYTES_PER_SECOND


def convert_in_child(path: str, folder: str) -> int:
    """The child's program: read the file and write its tensors into `folder`. Returns the exit status.

    The reason of a refusal is printed to standard output.
    """
    try:
        limit_resources(Path(path).stat().st_size)
        found = _read_pickle(Path(path))
        about = {"sizes": found.sizes, "is_nanogpt": found.is_nanogpt}
        save_file(found.weights, Path(folder) / TENSORS, metadata={"about": json.dumps(about)})
    except (ValueError, MemoryError) as error:
        sys.stdout.write(str(error) or "it needs too much memory for its size")
        return REFUSED
    return 0


def limit_resources(size: int) -> None:
    """Limit this process's memory, CPU time and written bytes by the size of the file it reads.

    The limits can't be raised again. On macOS memory is not limited.
    """
    torch.set_num_threads(1)  # each thread would reserve memory
    limits = {
        resource.RLIMIT_CPU: int(_time_limit(size)),
        resource.RLIMIT_FSIZE: size + SPARE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    statm = Path("/proc/self/statm")
    if statm.is_file():
        pages = int(statm.read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + 4 * size + SPARE_BYTES
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))


def _read_pickle(path: Path) -> PickledCheckpoint:
    """Read the file in the child process. Raises ValueError with the reason, without the path."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise ValueError(f"reading it safely needs torch 2.10 or newer, and this is {torch.__version__}")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(
            [*NUMPY_NUMBERS, *((PickledConfig, name) for name in CONFIG_CLASSES)]
        ):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # Only what the file asks for is kept of torch's long message.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = re.sub(r"[^\w.]", "?", named[1])[:100] if named else "something"
        raise ValueError(f"it asks for {what}, which may run code") from None
    except Exception as error:  # a malicious file can raise any error here
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    if type(content) is not dict or not isinstance(content.get("model"), dict):
        raise ValueError('it is not a checkpoint of nanoGPT: it has no dictionary "model"')
    is_nanogpt = "model_args" in content
    sizes = content["model_args"] if is_nanogpt else content.get("config")
    return PickledCheckpoint(_weights(content["model"], path.stat().st_size), _sizes(sizes), is_nanogpt)


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is an archive as torch.save writes it: undamaged and uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if is_packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("it is compressed, which files of torch.save never are")
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        raise ValueError("it is truncated, damaged, or not written by torch.save (1.6 or newer)") from None
    if damaged is not None:
        raise ValueError("it is damaged: its checksums do not match")


def _weights(model: dict[Any, Any], size: int) -> dict[str, Tensor]:
    tensors = {name: value for name, value in model.items() if type(value) in {Tensor, nn.Parameter}}
    if len(tensors) < len(model) or not all(isinstance(name, str) for name in tensors):
        raise ValueError('its "model" contains more than named tensors')
    if not all(each.layout == torch.strided and each.device.type == "cpu" for each in tensors.values()):
        raise ValueError('its "model" contains sparse tensors, or tensors without data')
    if sum(each.nbytes for each in tensors.values()) > 2 * size:  # head and embedding share their memory
        raise ValueError("its tensors are larger than the file")
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _sizes(config: Any) -> dict[str, int]:
    values = vars(config) if type(config) is PickledConfig else config
    if not isinstance(values, dict):
        raise ValueError("it is not a checkpoint of nanoGPT: it has neither model_args nor config")
    sizes = {name: value for name, value in values.items() if name in SIZE_NAMES}
    if not all(type(value) in {int, bool} for value in sizes.values()):
        raise ValueError("one of its model sizes is not a whole number")
    return sizes
