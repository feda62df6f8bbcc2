"""What was judged is not judged again: results are written down as they come, and read when begun anew.

    judged/<key>/<rank>.jsonl   a line per example: [its place, what the model makes of it]

The key is made of everything that decides the results. The folder is deleted when all is judged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from overnight import __version__
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.tasks import Example, Numbers
from overnight.model.gpt import GPT

Judge = Callable[[Sequence[Example]], Iterator[tuple[int, Numbers]]]


def cache_key(model: GPT, examples: Sequence[Example], precision: str) -> str:
    """One name for equal weights, equal examples, the same precision and version of this package."""
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


def evaluate_missing(
    folder: Path, examples: Sequence[Example], judge: Judge, world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, Numbers]]:
    """The place of every example, and what comes of it: what was judged before first, `judge` the rest.

    Of several processes each yields what it judges itself; the first, what was judged before.
    """
    before = _read(folder)
    world.barrier()  # all have read before one writes
    if world.is_main:
        yield from before.items()
    left = [place for place in range(len(examples)) if place not in before]
    with ExitStack() as held:
        file = None
        for place, numbers in judge([examples[place] for place in left]):
            if file is None:  # examples that can't be judged leave nothing behind
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context((folder / f"{world.rank}.jsonl").open("a"))
                file.write("\n")  # a line that was torn ends here
            file.write(json.dumps([left[place], numbers]) + "\n")
            file.flush()
            yield left[place], numbers


def clear_results(folder: Path) -> None:
    """Delete what was written down."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path) -> dict[int, Numbers]:
    """What earlier processes, however many, have written down; torn lines are left out."""
    found: dict[int, Numbers] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                place, numbers = json.loads(line)
            except ValueError:
                continue
            found[place] = tuple(numbers)
    return found
