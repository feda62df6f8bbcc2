"""build-nanogpt's model and training step, from a checkout of it.

Its train_gpt2.py is one program from the first line to the last, so it cannot be imported: only its
imports, classes and functions are taken. The step that its loop does is written out here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overnight.model.config import ModelConfig

PROGRAM = "train_gpt2.py"
NEEDED = ("GPT", "GPTConfig")
LEFT_OUT = "hellaswag"  # a program of the same checkout, which downloads
MODULE = "build_nanogpt"
PADDING_MULTIPLE = 64  # its program asks for 50,304 ids, which is 50,257 rounded up to whole tiles


def read_definitions(checkout: Path) -> ast.Module:
    """The imports, classes and functions of the checkout's program. Raises ValueError if it is none."""
    path = checkout / PROGRAM
    refusal = f"{checkout} is not a checkout of build-nanogpt"
    if not path.is_file():
        raise ValueError(f"{refusal}: there is no {PROGRAM} in it; give the folder that holds one")
    try:
        program = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{refusal}: its {PROGRAM} is not Python ({error})") from None
    wanted = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    body: list[ast.stmt] = [node for node in program.body if isinstance(node, wanted)]
    body = [node for node in body if not _is_left_out(node)]
    defined = {node.name for node in body if isinstance(node, ast.ClassDef)}
    missing = [name for name in NEEDED if name not in defined]
    if missing:
        raise ValueError(f"{refusal}: its {PROGRAM} does not define {' and '.join(missing)}")
    return ast.Module(body, type_ignores=[])


def _is_left_out(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == LEFT_OUT


def load_definitions(checkout: Path) -> ModuleType:
    """A module with the program's classes and functions, none of its statements run."""
    code = compile(read_definitions(checkout), str(checkout / PROGRAM), "exec")
    module = ModuleType(MODULE)
    module.__file__ = str(checkout / PROGRAM)
    vars(module)["master_process"] = False  # the program's own variable: False keeps it from printing
    sys.modules[MODULE] = module  # torch.compile finds a function's variables by its module's name
    exec(code, vars(module))
    return module


def copy_weights(ours: Mapping[str, Tensor], theirs: nn.Module) -> None:
    """Give the peer's model our weights; the rows of its padded vocabulary stay as they are."""
    import torch

    parameters = {name.removeprefix("transformer."): value for name, value in theirs.named_parameters()}
    assert parameters.keys() == ours.keys(), sorted(parameters.keys() ^ ours.keys())
    with torch.no_grad():
        for name, weight in ours.items():
            parameters[name][: weight.shape[0]].copy_(weight)


def build_model(module: ModuleType, config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Their GPT of our size, with the vocabulary padded as their program pads it, and our weights."""
    assert config.vocab_size is not None
    padded = -(-config.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = module.GPT(module.GPTConfig(block_size=config.context_length, vocab_size=padded, **sizes))
    copy_weights(weights, model)
    return model


def build_step(
    model: Any, *, bf16: bool, compiled: bool, learning_rate: Callable[[int], float]
) -> Callable[[Tensor, Tensor], float]:
    """(ids, targets) -> loss: one step as their loop does it, with one micro-batch and on the CPU.

    `bf16` is their autocast, which is on in what they publish; `compiled` their switch, which is off.
    """
    import torch

    torch.set_float32_matmul_precision("high")  # as their program does
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type="cpu")
    called: Any = torch.compile(model) if compiled else model
    finished = 0

    def step(ids_BT: Tensor, targets_BT: Tensor) -> float:
        nonlocal finished
        called.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            _, loss = called(ids_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(finished)
        optimizer.step()
        finished += 1
        return float(loss.detach().item())

    return step
