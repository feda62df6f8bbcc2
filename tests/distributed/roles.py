"""What the processes of a team do: each function here is called in all of them, by its name.

The tests run in other processes and import nothing from here: they name a role and its arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from overnight import cli
from overnight.data.dataset import open_dataset
from overnight.distributed import world as world_module
from overnight.distributed.watchdog import Watchdog
from overnight.evaluation import EvaluateConfig
from overnight.evaluation import command as evaluation_command
from overnight.run import train as run_train
from overnight.run.evaluate import open_run_tasks
from overnight.run.log import RunLog
from overnight.run.setup import build_run, initial_weights, resolve_on
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.load import load_checkpoint, read_newest
from overnight.training.checkpoint.save import save_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "campaigns"))
from mutants import original, replace


def play(role: str, given: Sequence[Any], environment: dict[str, str], log: str, answer: Connection) -> None:
    """Call the role in a launcher's environment; send back what it returns or raises."""
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False, buffering=1) for stream in (1, 2))
    try:
        answer.send(("returned", globals()[role](*given)))
    except BaseException as error:
        answer.send((type(error).__name__, str(error)))
        raise


# Whole runs

Batches = list[tuple[int, int, int, str]]  # step, first row, rows, digest of ids and targets


def before_each_step(change: Callable[[Any, Any], Any]) -> None:
    """From here on a step gets the set-up that `change` makes of (state, set-up)."""
    train_step = original("overnight.training.step:train_step")
    replace(
        "overnight.training.step:train_step", lambda state, setup: train_step(state, change(state, setup))
    )


@dataclasses.dataclass
class Observed:
    """A source of batches; each is shown to `observe` first."""

    source: Any
    observe: Callable[[int, int, Any], None]

    def batch(self, first_row: int, rows: int) -> Any:
        batch = self.source.batch(first_row, rows)
        self.observe(first_row, rows, batch)
        return batch


def train(
    recipe: Any, path: Path, stop: int | None = None, at_once: int | None = 3, resume: bool = False
) -> Batches:
    """A run, stopped after `stop` steps and evaluated `at_once` rows at a time; every batch it read here."""
    read: Batches = []

    def observed(state: Any, setup: Any) -> Any:
        def note(first_row: int, rows: int, batch: Any) -> None:
            text = batch.ids.numpy().tobytes() + batch.targets.numpy().tobytes()
            read.append((state.step, first_row, rows, hashlib.sha256(text).hexdigest()))

        return dataclasses.replace(setup, data=Observed(setup.data, note))

    if at_once is not None:
        limit_evaluation_batches(at_once)
    before_each_step(observed)
    if stop is not None:
        stop_after(stop)
    with contextlib.suppress(KeyboardInterrupt):
        run_train.train_recipe(recipe, RunDirectory(path), resume=resume)
    return read


def train_poisoned(recipe: Any, path: Path, steps: Sequence[int]) -> tuple[str, list[int]]:
    """A run whose rows of these steps have a loss of NaN; how it failed, and how many rows it skipped."""
    states: list[Any] = []

    def poisoned(state: Any, setup: Any) -> Any:
        states.append(state)
        plan, is_bad = setup.plan, [False]
        ends = [[plan.tokens_before(each) // plan.tokens_per_row for each in (s, s + 1)] for s in steps]

        def note(first_row: int, rows: int, batch: Any) -> None:
            is_bad[0] = any(first <= first_row < end for first, end in ends)

        def loss(ids: Any, targets: Any) -> Any:
            return setup.loss(ids, targets) * (float("nan") if is_bad[0] else 1.0)

        return dataclasses.replace(setup, data=Observed(setup.data, note), loss=loss)

    before_each_step(poisoned)
    message = ""
    try:
        run_train.train_recipe(recipe, RunDirectory(path))
    except FloatingPointError as error:
        message = str(error)
    return message, [skipped.rows for skipped in states[-1].guard.skipped]


def train_with_digests(recipe: Any, path: Path, step: int) -> list[str]:
    """A run whose loss of this step is NaN; a digest of all that this process keeps before each step."""
    found: list[str] = []

    def poisoned(state: Any, setup: Any) -> Any:
        kept = [tensor for each in state.optimizer.state.values() for tensor in each.values()]
        content = b"".join(each.detach().numpy().tobytes() for each in [*state.model.parameters(), *kept])
        found.append(hashlib.sha256(content).hexdigest())
        factor = float("nan") if state.step == step else 1.0
        return dataclasses.replace(setup, loss=lambda ids, targets: setup.loss(ids, targets) * factor)

    before_each_step(poisoned)
    run_train.train_recipe(recipe, RunDirectory(path))
    return found


def train_until(recipe: Any, path: Path, step: int, rank: int, ending: str) -> None:
    """A run in which something happens to one process after `step` steps."""

    def watched(state: Any, setup: Any) -> Any:
        if state.step == step and setup.world.rank == rank:
            ENDINGS[ending]()
        return setup

    before_each_step(watched)
    run_train.train_recipe(recipe, RunDirectory(path))


def limit_evaluation_batches(rows: int = 3) -> None:
    """So that each process has several batches to evaluate."""
    replace("overnight.evaluation.perplexity:evaluation_rows", lambda *_: rows)
    replace("overnight.evaluation.multiple_choice:TOKENS_AT_ONCE", 200)
    replace("overnight.evaluation.passages:TOKENS_AT_ONCE", 200)


def stop_after(steps: int) -> None:
    """The last process gets its signal after `steps` steps."""
    asked = iter(range(10**6))
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    replace("overnight.run.train:StopConditions.is_met", lambda stop: next(asked) >= steps and is_last)


def sleep_in_python() -> None:
    while True:
        time.sleep(0.1)


def sleep_in_c() -> None:
    """As a call that hangs in the driver: no other thread of Python runs."""
    ctypes.PyDLL(None).sleep(600)


def raise_error() -> None:
    raise RuntimeError("an unforeseen error")


ENDINGS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "signalled": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "frozen": sleep_in_python,
    "frozen in C": sleep_in_c,
    "broken": raise_error,
}


def command(folder: Path, words: Sequence[str], version: str | None = None) -> tuple[int, str]:
    """`overnight` with these words in `folder`, of that version; exit status and standard error."""
    os.chdir(folder)
    if version is not None:
        replace("overnight.run.preflight:__version__", version)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        status = cli.main(words)
    return status, printed.getvalue()


# Checkpoints


@contextlib.contextmanager
def opened(recipe: Any) -> Iterator[Any]:
    """The run of a recipe, ready to load a checkpoint: weights and moments are NaN."""
    with world_module.join_world("cpu", 60) as world:
        dataset = open_dataset(recipe.data)
        model, _ = initial_weights(recipe, dataset, None)
        run = build_run(resolve_on(recipe, model, dataset, world), dataset, None, world)
        forget(run.state)
        yield run


def forget(state: Any) -> None:
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(float("nan"))
    state.optimizer.state.clear()
    state.step = -1


def save_again(recipe: Any, checkpoints: Sequence[Path], folder: Path) -> None:
    """Load each checkpoint, and save it into a folder of its own below `folder`."""
    with opened(recipe) as run:
        for number, checkpoint in enumerate(checkpoints):
            forget(run.state)
            load_checkpoint(run.state, checkpoint, run.world)
            save_checkpoint(run.state, folder / str(number), world=run.world)


def load_newest(recipe: Any, folders: Sequence[Path]) -> list[tuple[int, str]]:
    """Of each folder of checkpoints the step that is loaded, -1 for none, and what is printed."""
    found, printed = [], []
    replace("overnight.terminal:echo", printed.append)
    with opened(recipe) as run:
        for folder in folders:
            forget(run.state)
            printed.clear()
            try:
                read_newest(folder, lambda path: load_checkpoint(run.state, path, run.world))
            except ValueError as error:
                printed.append(str(error))
            found.append((run.state.step, "\n".join(printed)))
    return found


def evaluate_checkpoint(recipe: Any, checkpoint: Path, path: Path) -> None:
    """Evaluate a checkpoint's model, sample from it and run the recipe's tasks, into the run `path`."""
    limit_evaluation_batches()
    with opened(recipe) as run:
        load_checkpoint(run.state, checkpoint, run.world)
        tasks = open_run_tasks(recipe.evaluation, run.dataset.tokenizer, run.resolved.plan.tokens_per_row)
        with RunLog(run, RunDirectory(path), Watchdog(run.world.rank, 60), tasks) as log:
            log.evaluate()
            log.sample()
            log.evaluate_tasks()


def evaluate(values: dict[str, Any]) -> str:
    """What `overnight evaluate --json` prints here."""
    limit_evaluation_batches()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation_command.run(EvaluateConfig(**values))
    return printed.getvalue()


# Collectives


def own_tensors(rank: int) -> list[torch.Tensor]:
    """What each process holds: tensors of several shapes, whose sums are rounded."""
    generator = torch.Generator().manual_seed(rank)
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 5), (1,), (40, 4), (0,), (7,)]
    return [torch.randn(shape, generator=generator) * 10**rank for shape in shapes]


def collect(collective: str, bucket_bytes: int, *given: int) -> tuple[list[Any], list[Any]]:
    """The tensors, as lists, before and after `world.<collective>(tensors, *given)` in such buckets."""
    world_module.BUCKET_BYTES = bucket_bytes
    with world_module.join_world("cpu", 20) as world:
        tensors = own_tensors(world.rank)
        before = [tensor.tolist() for tensor in tensors]
        getattr(world, collective)(tensors, *given)
        return before, [tensor.tolist() for tensor in tensors]


def describe_world() -> dict[str, Any]:
    """Rank and sizes, and the results of `any` and `all_gather_object`."""
    with world_module.join_world("cpu", 20) as world:
        last = world.size - 1
        answers = {
            "place": (world.rank, world.size, world.local_rank, world.local_size, world.device),
            "any": [world.any(False), world.any(world.rank == last), world.any(True)],
            "gather": world.all_gather_object(f"I am {world.rank}" * (1 + 100 * world.rank)),
        }
        world.barrier()
        return answers


def raise_in_some(errors: Sequence[str | None]) -> str:
    """What `raise_together` makes of the errors of some ranks; afterwards all meet again."""
    with world_module.join_world("cpu", 20) as world:
        message = "nothing"
        try:
            with world.raise_together():
                if errors[world.rank] is not None:
                    raise ValueError(errors[world.rank])
        except ValueError as error:
            message = str(error)
        world.barrier()
        return message
