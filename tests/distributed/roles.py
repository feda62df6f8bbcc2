"""What the processes of a team do: each function here is called in every one of them, by its name.

The tests are other processes and import nothing from here: they name a role and hand over its arguments.
"""

from __future__ import annotations

import contextlib
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


def play(role: str, given: Sequence[Any], environment: dict[str, str], log: str, answer: Connection) -> None:
    """Call the role where the environment is that of a launcher; send back what it returns or raises."""
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


# ---------------------------------------------------------------- whole runs


Batches = list[tuple[int, int, int, str]]
"""(step, first row, rows, digest of ids and targets) of each."""


def train(recipe: Any, path: Path, stop: int | None = None, rows_judged: int | None = None) -> Batches:
    """A run, stopped after so many steps if `stop` says so; every batch that this process asked for.

    It is judged so many rows at a time, so that there are batches to be divided.
    """
    judge_rows(rows_judged)
    return note_batches(recipe, path, stop, resume=False)


def go_on(path: Path, stop: int | None, compute: dict[str, Any], rows_judged: int | None = None) -> Batches:
    """`train`, of the run in `path`, with these settings otherwise than before."""
    from overnight.run.command import load_resumed

    judge_rows(rows_judged)
    before = load_resumed(path)
    recipe = dataclasses.replace(before, compute=dataclasses.replace(before.compute, **compute))
    return note_batches(recipe, path, stop, resume=True)


def note_batches(recipe: Any, path: Path, stop: int | None, *, resume: bool) -> Batches:
    from overnight.run import setup, train
    from overnight.run_directory import RunDirectory

    asked: Batches = []
    build = setup.build_training

    def build_noting(job: Any) -> Any:
        training = build(job)

        def batches(first_row: int, rows: int) -> Any:
            batch = training.batches(first_row, rows)
            text = batch.ids.numpy().tobytes() + batch.targets.numpy().tobytes()
            asked.append((job.state.step, first_row, rows, hashlib.sha256(text).hexdigest()))
            return batch

        return dataclasses.replace(training, batches=batches)

    setup.build_training = build_noting
    if stop is not None:
        train.stop_on_signal = max_time(stop)
    with contextlib.suppress(KeyboardInterrupt):
        train.run(recipe, RunDirectory(path), resume=resume)
    return asked


def train_poisoned(recipe: Any, path: Path, steps: Sequence[int]) -> tuple[str, list[int]]:
    """A run whose rows of these steps have no finite loss; how it failed, and which rows were left out."""
    from overnight.run import setup, train
    from overnight.run_directory import RunDirectory

    build, jobs = setup.build_training, []

    def build_poisoned(job: Any) -> Any:
        training, is_bad, plan = build(job), False, job.plan
        jobs.append(job)
        ends = [[plan.tokens_before(each) // plan.tokens_per_row for each in (s, s + 1)] for s in steps]

        def batches(first_row: int, rows: int) -> Any:
            nonlocal is_bad
            is_bad = any(first <= first_row < end for first, end in ends)
            return training.batches(first_row, rows)

        def loss(ids: Any, targets: Any) -> Any:
            nats = training.loss(ids, targets)
            return nats * float("nan") if is_bad else nats

        return dataclasses.replace(training, batches=batches, loss=loss)

    setup.build_training = build_poisoned
    said = ""
    try:
        train.run(recipe, RunDirectory(path))
    except FloatingPointError as error:
        said = str(error)
    return said, [detour.rows for detour in jobs[-1].state.guard.skipped]


def judge_rows(at_once: int | None) -> None:
    from overnight.run import log as log_module

    if at_once is not None:
        log_module.evaluation_rows = lambda model: at_once


def max_time(steps: int) -> Callable[[], Any]:
    """Stands for stop_on_signal: the signal comes after so many more steps, to the last process only."""

    @contextlib.contextmanager
    def signalled() -> Iterator[Callable[[], bool]]:
        asked = iter(range(10**6))
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        yield lambda: next(asked) >= steps and is_last

    return signalled


def train_until(recipe: Any, path: Path, step: int, rank: int, ending: str) -> None:
    """A run in which something becomes of one process once so many steps are done."""
    from overnight.run import train
    from overnight.run_directory import RunDirectory
    from overnight.training import step as step_module

    train_step = step_module.train_step

    def watched(state: Any, training: Any) -> Any:
        if state.step == step and training.world.rank == rank:
            ENDINGS[ending]()
        return train_step(state, training)

    step_module.train_step = watched
    train.run(recipe, RunDirectory(path))


def sleep_in_python() -> None:
    while True:
        time.sleep(0.1)


def sleep_in_c() -> None:
    """As a call that hangs in the driver: no other thread of Python gets a word in."""
    import ctypes

    ctypes.PyDLL(None).sleep(600)


def disagree() -> None:
    raise RuntimeError("an error that nobody foresaw")


ENDINGS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "told to stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "frozen": sleep_in_python,
    "frozen in C": sleep_in_c,
    "broken": disagree,
}


def command(folder: Path, words: Sequence[str], version: str | None = None) -> tuple[int, str]:
    """`overnight` with these words in `folder`, of that version; the exit status and what it says."""
    from overnight import cli
    from overnight.run import setup

    os.chdir(folder)
    cli.SECONDS_TO_SPEAK = 0.0
    setup.__version__ = version or setup.__version__
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = cli.main(words)
    return status, said.getvalue()


# ---------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def opened(recipe: Any) -> Iterator[Any]:
    """The job of a run that has a checkpoint, with weights and moments that are no numbers yet."""
    from overnight.distributed.world import join_world
    from overnight.run.setup import build_setup

    with join_world("cpu", 60) as world:
        job = build_setup(recipe, world, has_checkpoint=True)
        forget(job.state)
        yield job


def forget(state: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(float("nan"))
    state.optimizer.state.clear()
    state.step = -1


def save_again(recipe: Any, checkpoints: Sequence[Path], folder: Path) -> None:
    """Load each checkpoint and save it below `folder`, in a folder of its own."""
    from overnight.training.checkpoint.load import load_checkpoint
    from overnight.training.checkpoint.save import save_checkpoint

    with opened(recipe) as job:
        for number, checkpoint in enumerate(checkpoints):
            forget(job.state)
            load_checkpoint(job.state, checkpoint, job.world)
            save_checkpoint(job.state, folder / str(number), world=job.world)


def load_newest(recipe: Any, folders: Sequence[Path]) -> list[tuple[int, str]]:
    """Of each folder of checkpoints the step that is loaded, -1 for none, and what is said on the way."""
    from overnight.training.checkpoint import load

    said: list[str] = []
    load.echo = said.append
    found = []
    with opened(recipe) as job:
        for folder in folders:
            forget(job.state)
            said.clear()
            try:
                load.read_newest(folder, lambda path: load.load_checkpoint(job.state, path, job.world))
            except ValueError as error:
                said.append(str(error))
            found.append((job.state.step, "\n".join(said)))
    return found


def judge(recipe: Any, checkpoint: Path, path: Path, rows_judged: int) -> None:
    """Evaluate the model of a checkpoint and let it write, into the run directory `path`."""
    from overnight.distributed.watchdog import Watchdog
    from overnight.run.log import RunLog
    from overnight.run_directory import RunDirectory
    from overnight.training.checkpoint.load import load_checkpoint

    judge_rows(rows_judged)
    with opened(recipe) as job:
        load_checkpoint(job.state, checkpoint, job.world)
        with RunLog(job, RunDirectory(path), Watchdog(job.world.rank, 60)) as journal:
            journal.evaluate()
            journal.sample()


def judge_tasks(recipe: Any, checkpoint: Path, path: Path) -> None:
    """Judge the model of a checkpoint on the recipe's tasks, into the run directory `path`."""
    from overnight.distributed.watchdog import Watchdog
    from overnight.evaluation import multiple_choice, passages
    from overnight.run.log import RunLog, open_run_tasks
    from overnight.run_directory import RunDirectory
    from overnight.training.checkpoint.load import load_checkpoint

    multiple_choice.TOKENS_AT_ONCE = passages.TOKENS_AT_ONCE = 200  # several batches for each process
    with opened(recipe) as job:
        load_checkpoint(job.state, checkpoint, job.world)
        tasks = open_run_tasks(recipe.evaluation, job.dataset.tokenizer, job.plan.tokens_per_row)
        with RunLog(job, RunDirectory(path), Watchdog(job.world.rank, 60), tasks) as journal:
            journal.judge_tasks()


def evaluate(values: dict[str, Any]) -> str:
    """What `overnight evaluate --json` prints here."""
    import io

    from overnight.evaluation import command as evaluation_command
    from overnight.evaluation import multiple_choice, passages

    multiple_choice.TOKENS_AT_ONCE = passages.TOKENS_AT_ONCE = 200
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation_command.run(evaluation_command.EvaluateConfig(**values))
    return printed.getvalue()


# ---------------------------------------------------------------- what processes say to each other


@contextlib.contextmanager
def joined(bucket_bytes: int | None = None) -> Iterator[Any]:
    """The world, whose buckets hold so much."""
    from overnight.distributed import world

    world.BUCKET_BYTES = bucket_bytes or world.BUCKET_BYTES
    with world.join_world("cpu", 20) as joining:
        yield joining


def own_tensors(rank: int) -> list[Any]:
    """What each process has: tensors of several shapes, whose sums are rounded."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    shapes = [(), (3,), (2, 5), (1,), (40, 4), (0,), (7,)]
    return [torch.randn(shape, generator=generator) * 10**rank for shape in shapes]


def say_all(way: str, bucket_bytes: int | None, *given: int) -> list[Any]:
    """The tensors, as lists, after `world.<way>(tensors, *given)`."""
    with joined(bucket_bytes) as world:
        tensors = own_tensors(world.rank)
        getattr(world, way)(tensors, *given)
        return [tensor.tolist() for tensor in tensors]


def find_out() -> dict[str, Any]:
    """What small questions are answered with."""
    with joined() as world:
        last = world.size - 1
        answers = {
            "place": (world.rank, world.size, world.local_rank, world.local_size, world.device),
            "any": [world.any(False), world.any(world.rank == last), world.any(True)],
            "gather": world.all_gather_object(f"I am {world.rank}" * (1 + 100 * world.rank)),
        }
        world.barrier()
        return answers


def refuse(refusals: Sequence[str | None]) -> str:
    """What `together` makes of a refusal by some ranks, and whether all go on afterwards."""
    with joined() as world:
        said = "nothing"
        try:
            with world.raise_together():
                if refusals[world.rank] is not None:
                    raise ValueError(refusals[world.rank])
        except ValueError as error:
            said = str(error)
        world.barrier()
        return said


def leave(rank: int, ending: str) -> None:
    """One process leaves while the others wait for it."""
    with joined() as world:
        world.barrier()
        if world.rank == rank:
            ENDINGS[ending]()
        world.barrier()


def add_up_in_tree(micro_batches: int) -> list[list[float]]:
    """The gradients of so many micro-batches, which these processes share."""
    import torch

    from overnight.training.batch import constant_plan
    from overnight.training.sharding import accumulate_gradients_bitwise as add_up

    weights = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2, 2))]

    def backward(number: int) -> Any:
        leaf = own_tensors(number % 7)[4].flatten()
        weights[0].grad = leaf[:5] * (number + 1) / 3
        weights[1].grad = leaf[5:9].view(2, 2) * (number + 1) / 7
        return leaf[9] / (number + 1)

    with joined() as world:
        share = constant_plan(1, 1, micro_batches).share(0, world.rank, world.size)
        nats = add_up(backward, share, weights, world)
        return [weight.grad.flatten().tolist() for weight in weights] + [[nats.item()]]
