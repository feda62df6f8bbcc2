"""llm.c as a side of train_step.py: its C functions on a CPU, its built program on a GPU.

Both begin with the weights that all sides begin with, written in llm.c's own format.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from checkouts import find_cuda_program

if TYPE_CHECKING:
    from overnight.model.gpt import GPT
    from sides import Task

# Its train_gpt2.py writes the same: 256 int32, then every tensor, each kind for all layers in a row.
MODEL_MAGIC, FLOAT32, BFLOAT16, HEADER_INTEGERS = 20240326, 3, 5, 256
PADDING_MULTIPLE = 128
OF_A_LAYER = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"),
    *("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)
TOKENS_MAGIC, TOKENS_VERSION = 20240520, 1

DRIVER = Path(__file__).with_name("llmc_step.c")
FLAGS = ("-Ofast", "-march=native", "-fopenmp", "-DOMP")  # those of its Makefile
CUDA_STEPS = 4  # of one turn, which is a process of its own; the first is not timed
CUDA_LINE = re.compile(r"^step\s+\d+/\d+ \| loss (\S+) .*\| (\S+) ms \|", re.MULTILINE)


def find_compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc")


def write_checkpoint(path: Path, model: GPT, *, bf16: bool) -> None:
    """A model of ours as a file that llm.c opens."""
    import torch

    config, weights = model.config, model.weights()
    assert config.vocab_size is not None
    padded = -(-config.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE
    header = np.zeros(HEADER_INTEGERS, dtype=np.int32)
    header[:8] = (
        *(MODEL_MAGIC, BFLOAT16 if bf16 else FLOAT32, config.context_length, config.vocab_size),
        *(config.n_layer, config.n_head, config.n_embd, padded),
    )
    layers = range(config.n_layer)
    names = ["wpe.weight", *(f"h.{layer}.{name}" for name in OF_A_LAYER for layer in layers)]
    padding = torch.zeros(padded - config.vocab_size, config.n_embd)
    embedding = torch.cat([weights["wte.weight"], padding])
    tensors = [embedding, *(weights[name] for name in [*names, "ln_f.weight", "ln_f.bias"])]
    with path.open("wb") as file:
        file.write(header.tobytes())
        for tensor in tensors:
            whole = tensor.to(torch.bfloat16).view(torch.int16) if bf16 else tensor.float()
            file.write(whole.contiguous().numpy().tobytes())


def write_tokens(path: Path, ids: NDArray[np.integer]) -> None:
    """Ids as a file that llm.c reads."""
    header = np.zeros(HEADER_INTEGERS, dtype=np.int32)
    header[:3] = TOKENS_MAGIC, TOKENS_VERSION, ids.size
    path.write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())


# ---------------------------------------------------------------- on a CPU


def compile_driver(checkout: Path, folder: Path) -> Path:
    """llm.c's functions and our loop as a program in `folder`. Raises ChildProcessError with what cc says."""
    program = folder / "llmc_step"
    command = [find_compiler() or "cc", *FLAGS, "-I", str(checkout), str(DRIVER), "-o", str(program), "-lm"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise ChildProcessError(f"llm.c does not compile here:\n{finished.stderr}")
    return program


def become_driver(task: Task, model: GPT, schedule: tuple[float, int]) -> NoReturn:
    """Go on as llm.c's program, which answers on this process's standard output from here on."""
    assert task.checkout is not None
    folder = Path(task.folder)
    program = compile_driver(Path(task.checkout), folder)
    checkpoint, ids = folder / "llmc.bin", folder / "llmc-ids.bin"
    write_checkpoint(checkpoint, model, bf16=False)
    np.load(task.ids).astype(np.int32).tofile(ids)
    numbers = (task.rows, model.config.context_length, *schedule)
    sys.stdout.flush()
    os.execv(program, [str(program), str(checkpoint), str(ids), *map(str, numbers)])


# ---------------------------------------------------------------- on a GPU


def cuda_turn(task: Task, model: GPT, schedule: tuple[float, int]) -> Callable[[], Mapping[str, object]]:
    """A function that runs llm.c's program for a few steps from the first on, and times the later ones.

    Its loader shuffles micro-batches, so it is given the first step's rows and no more: the loss of the
    first step is that of the other sides' first step.
    """
    assert task.checkout is not None
    folder, context_length = Path(task.folder), model.config.context_length
    tokens = task.micro_batches * task.rows * context_length
    checkpoint, data = folder / "llmc.bin", folder / "llmc-ids.bin"
    write_checkpoint(checkpoint, model, bf16=True)
    write_tokens(data, np.load(task.ids)[: tokens + 1])
    command = cuda_command(find_cuda_program(Path(task.checkout)), (checkpoint, data))
    command += ["-b", str(task.rows), "-t", str(context_length), "-d", str(tokens)]
    command += ["-l", str(schedule[0]), "-u", str(schedule[1])]

    def turn() -> Mapping[str, object]:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise ChildProcessError(f"llm.c's program failed:\n{finished.stdout[-2000:]}{finished.stderr}")
        milliseconds, loss = read_cuda_steps(finished.stdout)
        return {"milliseconds": milliseconds, "losses": [loss], "peak_bytes": None}

    return turn


def cuda_command(program: Path, files: tuple[Path, Path]) -> list[str]:
    """llm.c's program with the settings of its own script for GPT-2 124M, without evaluation and samples."""
    checkpoint, data = map(str, files)
    never = str(10**6)
    return [
        *(str(program), "-e", checkpoint, "-i", data, "-j", data, "-x", str(CUDA_STEPS)),
        *("-v", never, "-m", "1", "-s", "0", "-c", "0.1", "-r", "0"),
    ]


def read_cuda_steps(printed: str) -> tuple[float, float]:
    """(median milliseconds of the steps after the first, loss of the first). Raises ValueError for none."""
    steps = CUDA_LINE.findall(printed)
    if len(steps) < 2:
        raise ValueError(f"llm.c's program printed no steps:\n{printed[-2000:]}")
    return statistics.median(float(milliseconds) for _, milliseconds in steps[1:]), float(steps[0][0])
