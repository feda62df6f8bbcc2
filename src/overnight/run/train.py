"""Training a recipe into a run directory: prepare, open, resolve, build, then step after step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from overnight.config import naming, parse_duration, raise_problems
from overnight.conversion.open_model import open_model
from overnight.data.dataset import Dataset, MixtureDataset, open_dataset
from overnight.data.incremental import IncrementalStream
from overnight.distributed.launcher import is_launched
from overnight.distributed.watchdog import Watchdog, watchdog
from overnight.distributed.world import World, join_world
from overnight.model.gpt import GPT
from overnight.preparation.prepare import ensure_prepared
from overnight.recipe import Recipe, Resolved
from overnight.run.environment import explain_choices
from overnight.run.evaluate import RunTask, open_run_tasks
from overnight.run.log import RunLog
from overnight.run.preflight import check_checkpoint_space
from overnight.run.resume import begin, check_directory, needs_rollback, record_data, roll_back
from overnight.run.setup import RunSetup, build_run, initial_weights, resolve_on
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, quote, shell_command, write_unprinted
from overnight.training.checkpoint.format import list_checkpoints
from overnight.training.step import train_step

# Slurm sends USR1 before its time limit, the kernel HUP when a terminal is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def train_recipe(recipe: Recipe, directory: RunDirectory, *, resume: bool = False) -> Resolved:
    """Train `recipe` into `directory`; returns the recipe with everything decided.

    With `resume` the run continues from its newest good checkpoint. Interrupted by a signal, it is saved
    after the current step, and KeyboardInterrupt is raised. Raises ValueError if the recipe can't be trained
    there, before any file of a run is written into `directory`.
    """
    with join_world(recipe.compute.device, recipe.compute.timeout_seconds) as world:
        with world.raise_together():
            check_directory(recipe, directory, resume=resume)
            raise_problems(recipe.problems(), f"recipe {recipe.run_name}")
            dataset = open_dataset(ensure_prepared(recipe.data))
            # A resumed run loads its weights from the checkpoint and needs no initial model.
            has_checkpoint = resume and bool(list_checkpoints(directory.checkpoints))
            source = None if has_checkpoint else open_initial_model(recipe, dataset)
            model, weights = initial_weights(recipe, dataset, source)
            resolved = resolve_on(recipe, model, dataset, world)
            check_checkpoint_space(resolved, directory.path, directory.checkpoints)
            tasks = open_run_tasks(recipe.evaluation, dataset.tokenizer, model.context_length)
        run = build_run(resolved, dataset, None if has_checkpoint else weights, world)
        with ExitStack() as held:
            with world.raise_together():
                if world.is_main:
                    held.enter_context(directory.locked())
                    held.callback(write_unprinted, directory.unprinted)
                    check_directory(recipe, directory, resume=resume)  # another run may have started since
            begin(run, directory, explain_choices(recipe, run, resume=resume), resume=resume)
            fit(run, directory, tasks)
    return run.resolved


def open_initial_model(recipe: Recipe, dataset: Dataset | MixtureDataset) -> GPT | None:
    """The model that `init_from` names, or None. Raises ValueError if its tokenizer is not the dataset's."""
    if recipe.init_from is None:
        return None
    opened = open_model(recipe.init_from)
    if opened.tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise ValueError(
            f"{dataset.folder} was prepared with the tokenizer {dataset.tokenizer.name}, and "
            f"{recipe.init_from} uses another: prepare the text with "
            f"--tokenizer {quote(str(opened.tokenizer_folder))}"
        )
    return opened.model


def fit(run: RunSetup, directory: RunDirectory, tasks: Sequence[RunTask]) -> None:
    """Train until the last step, a signal, the time limit or the end of the text; then save.

    Raises KeyboardInterrupt if the run is not finished.
    """
    state, world, total_steps = run.state, run.world, run.resolved.total_steps
    checkpoints = run.resolved.recipe.checkpoints
    with (
        recording_failure(run, directory),  # outermost: an unfinished checkpoint is deleted before
        watchdog(world.rank, world.size, run.resolved.recipe.compute.timeout_seconds) as watch,
        RunLog(run, directory, watch, tasks) as log,
        StopConditions(checkpoints.max_time) as stop,
    ):
        log.evaluate_at_start()
        while state.step < total_steps and not must_stop(run, stop, watch, log):
            result = train_step(state, run.training)
            if needs_rollback(run):
                log.wait_for_checkpoint()
                roll_back(run, directory)
                log.state_restored()
            else:
                log.after_step(result)
        log.save()
        log.finish_checkpoints()
        record_data(run, directory)
        is_finished = state.step == total_steps
        if world.is_main:
            directory.record_end(state.step, "its last step" if is_finished else stop.reason)
    if not is_finished:
        echo(f"stopped and saved after step {state.step} of {total_steps}")
        echo(f"next: {shell_command('train', '--resume', directory.path)}")
        raise KeyboardInterrupt


class StopConditions:
    """A signal or the end of `max_time`: the run then stops after the current step.

    A second signal interrupts at once, except in a process of a launcher, which may get the same signal from
    its sender and once more from the launcher.
    """

    def __init__(self, max_time: str | None) -> None:
        self._seconds = None if max_time is None else parse_duration(max_time)
        self._started_at = time.monotonic()
        self._signals: list[int] = []

    def __enter__(self) -> StopConditions:
        # Python allows signal handlers in the main thread only; a run in another thread has none.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = STOP_SIGNALS if is_main else ()
        is_detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        self._handlers = {
            number: signal.signal(number, self._receive)
            for number in numbers
            if not (number == signal.SIGHUP and is_detached)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._signals and not is_launched():
            raise KeyboardInterrupt
        if not self._signals:
            echo("finishing the step; Ctrl-C again stops now, without saving")
        self._signals.append(number)

    def is_met(self) -> bool:
        """True after a signal, or once the time limit is reached."""
        return bool(self._signals) or self._is_out_of_time()

    def _is_out_of_time(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._started_at >= self._seconds

    @property
    def reason(self) -> str:
        """Why an unfinished run stopped."""
        if self._is_out_of_time():
            return "its time limit"
        return "a signal" if self._signals else "a lack of text"


def must_stop(run: RunSetup, stop: StopConditions, watch: Watchdog, log: RunLog) -> bool:
    """True if any process must stop, or if the next step's text is missing and no process prepares it.

    Waits for text that is being prepared. With several processes it first waits for the checkpoint under
    way, since they publish it only after a step.
    """
    watch.heartbeat()
    world: World = run.world
    if not isinstance(run.train, IncrementalStream):
        return world.any(stop.is_met())
    plan, state = run.resolved.plan, run.state
    rows = plan.tokens_before(state.step + 1) // plan.tokens_per_row + state.guard.skipped_rows(state.step)
    if world.size > 1:
        log.wait_for_checkpoint()
    with watch.paused():
        return world.any(stop.is_met() or not run.train.wait_for(rows, stop.is_met))


@contextmanager
def recording_failure(run: RunSetup, directory: RunDirectory) -> Iterator[None]:
    """Context manager: an error that ends the run is recorded in its directory, if that is writable."""
    try:
        with naming(directory.path):
            yield
    except (FloatingPointError, OSError) as error:
        if run.world.is_main:
            with suppress(OSError):
                directory.record_end(run.state.step, f"{type(error).__name__}: {error}")
        raise
