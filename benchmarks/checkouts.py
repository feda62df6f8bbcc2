"""What is taken from a peer's checkout: its definitions. None of its statements is run."""

from __future__ import annotations

import ast
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

LEFT_OUT = "hellaswag"  # a program of build-nanogpt's checkout, which downloads
IMPORTS_AND_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)


@dataclass(frozen=True, kw_only=True)
class Program:
    """Where a peer keeps its model."""

    peer: str
    file: str
    needed: tuple[str, ...]
    """Classes by which its file is known."""
    others: tuple[str, ...] = ()
    """Files that lie in its checkout beside that one."""


CLASSES = ("GPT", "GPTConfig")
BUILD_NANOGPT = Program(peer="build-nanogpt", file="train_gpt2.py", needed=(*CLASSES, "DataLoaderLite"))
NANOGPT = Program(
    peer="nanoGPT",
    file="model.py",
    needed=CLASSES,
    others=("train.py", "config/train_shakespeare_char.py", "data/shakespeare_char/prepare.py"),
)
LLM_C_FILES = ("train_gpt2.c", "llmc/dataloader.h")
LLM_C_FUNCTIONS = ("gpt2_build_from_checkpoint", "gpt2_update")
LLM_C_CUDA = "train_gpt2cu"


def read_definitions(program: Program, checkout: Path) -> ast.Module:
    """The imports, classes and functions of the peer's file. Raises ValueError if it is no such checkout."""
    path = checkout / program.file
    refusal = f"{checkout} is not a checkout of {program.peer}"
    for name in (program.file, *program.others):
        if not (checkout / name).is_file():
            raise ValueError(f"{refusal}: there is no {name} in it; give the folder that holds one")
    try:
        parsed = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{refusal}: its {program.file} is not Python ({error})") from None
    body: list[ast.stmt] = [node for node in parsed.body if isinstance(node, IMPORTS_AND_DEFINITIONS)]
    body = [node for node in body if not (isinstance(node, ast.ImportFrom) and node.module == LEFT_OUT)]
    defined = {node.name for node in body if isinstance(node, ast.ClassDef)}
    missing = [name for name in program.needed if name not in defined]
    if missing:
        raise ValueError(f"{refusal}: its {program.file} does not define {' and '.join(missing)}")
    return ast.Module(body, type_ignores=[])


def load_definitions(program: Program, checkout: Path) -> ModuleType:
    """A module with the file's classes and functions."""
    path = str(checkout / program.file)
    code = compile(read_definitions(program, checkout), path, "exec")
    module = ModuleType(program.peer.replace("-", "_").lower())
    module.__file__ = path
    vars(module)["master_process"] = False  # build-nanogpt's variable: False keeps it from printing
    sys.modules[module.__name__] = module  # torch.compile finds a function's variables by its module's name
    exec(code, vars(module))
    return module


def check_llm_c(path: Path, device: str) -> None:
    """Raise ValueError unless `path` is llm.c's checkout, or for a GPU its built program."""
    if device != "cpu":
        find_cuda_program(path)
        return
    refusal = f"{path} is not a checkout of llm.c"
    for name in LLM_C_FILES:
        if not (path / name).is_file():
            raise ValueError(f"{refusal}: there is no {name} in it; give the folder that holds one")
    source = (path / LLM_C_FILES[0]).read_text(encoding="utf-8", errors="replace")
    missing = [name for name in LLM_C_FUNCTIONS if name not in source]
    if missing:
        raise ValueError(f"{refusal}: its {LLM_C_FILES[0]} does not define {' and '.join(missing)}")


def find_cuda_program(path: Path) -> Path:
    """llm.c's program for GPUs: `path` itself, or the one that was built in that checkout."""
    program = path / LLM_C_CUDA if path.is_dir() else path
    if not program.is_file():
        raise ValueError(
            f"{path} holds no {LLM_C_CUDA}: build it in a checkout of llm.c with `make {LLM_C_CUDA} "
            "USE_CUDNN=1`, and name the checkout or the program"
        )
    return program


def fingerprint(path: Path) -> str:
    """The first digits of a file's sha256, by which a reader knows which version was measured."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
