"""Writes each result to a file, so that an interrupted evaluation continues.

    judged/<key>/<rank>.jsonl   a line per example: [index, result]

The key is a hash of everything that decides the results. The folder is deleted when all results are complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from overnight import __version__
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.scores import Example, Numbers, TaskResult
from overnight.evaluation.tasks import Task, evaluate_task, gather_results
from overnight.model.gpt import GPT
from overnight.run_directory import cache_folder
from overnight.terminal import progress
from overnight.tokenizer.tokenizer import Tokenizer


def evaluate_cached(task: Task, model: GPT, tokenizer: Tokenizer, precision: str, world: World) -> TaskResult:
    """The model's results on every example, the same in all processes, with a progress bar.

    Continues an evaluation that was interrupted.
    """
    examples = task.encode(tokenizer, model.config.context_length)
    folder = cache_folder() / "judged" / cache_key(model, examples, precision)
    own: list[tuple[int, Numbers]] = []
    with progress(task.name, len(examples), "examples") as advance:
        for pair in evaluate_missing(folder, model, examples, precision, world):
            # Other processes are assumed to be as fast; the last of them may have no example left.
            advance(min(world.size, max(0, len(examples) - world.size * len(own))))
            own.append(pair)
    numbers = gather_results(own, world)
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return TaskResult(examples, numbers)


def evaluate_missing(
    folder: Path, model: GPT, examples: Sequence[Example], precision: str, world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, Numbers]]:
    """Yield (index, result): those in `folder`, and those of the remaining examples, which are written there.

    The first process yields those in `folder`; each process yields the results of its own share of the rest.
    """
    known = _read(folder)
    world.barrier()  # all processes have read before one writes
    if world.is_main:
        yield from known.items()
    missing = [index for index in range(len(examples)) if index not in known]
    rest = [examples[index] for index in missing]
    for position, numbers in evaluate_task(model, rest, precision, world):
        index = missing[position]
        folder.mkdir(parents=True, exist_ok=True)  # only now: invalid examples leave no folder behind
        with (folder / f"{world.rank}.jsonl").open("a") as file:
            file.write("\n" + json.dumps([index, numbers]))  # a new line, since the last may be incomplete
        yield index, numbers


def cache_key(model: GPT, examples: Sequence[Example], precision: str) -> str:
    """A hash of the weights, the examples, the precision, the device type and this package's version."""
    device = model.wte.weight.device.type
    digest = hashlib.sha256(json.dumps([__version__, precision, device, str(model.config)]).encode())
    for name, weight in sorted(model.weights().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().cpu().numpy().data)
    for example in examples:
        parts = (
            [example.context, *example.leads, *example.endings]
            if isinstance(example, Choice)
            else [example.ids, [example.scored]]
        )
        for part in parts:
            digest.update(np.asarray(part, dtype=np.int64).data)
            digest.update(b"|")
    return digest.hexdigest()


def _read(folder: Path) -> dict[int, Numbers]:
    """The results of earlier processes; incomplete lines are ignored."""
    found: dict[int, Numbers] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                index, numbers = json.loads(line)
            except ValueError:
                continue
            found[index] = tuple(numbers)
    return found
