"""From a recipe to a trained model in a run directory: build, build, build, fit."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from torch import Tensor

from overnight.batching import BatchConfig, BatchPlan, plan_batches
from overnight.checkpoint.layout import discard_checkpoints_after, list_checkpoints
from overnight.checkpoint.loading import Opened, open_checkpoint, read_newest, restore
from overnight.data.ahead import read_ahead
from overnight.data.growing import GrowingStream
from overnight.loss import Head, nats_of_hidden
from overnight.model.documents import find_documents
from overnight.model.gpt import GPT
from overnight.parallel import build_loss
from overnight.run_directory import RunDirectory, write_atomically
from overnight.schedule import learning_rate_multiplier
from overnight.settings import from_toml, parse_duration, raise_problems, to_toml
from overnight.sharding import SHARDS, choose_sum, spread_updates
from overnight.stages.environment import describe_environment, explain_choices
from overnight.stages.job import Job, build_job
from overnight.stages.journal import Journal
from overnight.stages.materials import is_same_text
from overnight.stages.recipe import Recipe, changed_settings, lasting_settings
from overnight.stages.rollback import build_go_back
from overnight.stages.run_tasks import RunTask, open_run_tasks
from overnight.terminal import say
from overnight.text.load import load_tokenizer
from overnight.trainer import Training, fit, fits, stop_on_signal
from overnight.watch import Watch, watched
from overnight.world import World, join_world

BYTES_PER_SAVED_PARAMETER = 12  # a weight and AdamW's two moments, float32


def run(recipe: Recipe, directory: RunDirectory, *, resume: bool = False) -> Recipe:
    """Train what `recipe` describes into `directory`; returns the recipe with everything decided.

    With `resume` the run goes on from its newest good checkpoint. Interrupted by a signal, it is saved
    after the step it is at, and KeyboardInterrupt is raised. Raises ValueError if the recipe can't be
    trained there, before any file of a run is written into `directory`.
    """
    with join_world(recipe.compute.device, recipe.compute.timeout_seconds) as world:
        with world.together():
            check_directory(recipe, directory, resume=resume)
            has_checkpoint = resume and bool(list_checkpoints(directory.checkpoints))
        job = build_job(recipe, world, has_checkpoint=has_checkpoint)
        with world.together():
            check_disk(job, directory)
            tasks = open_run_tasks(recipe.evaluation, job.materials.tokenizer, job.plan.tokens_per_row)
        training, job = fit_into_memory(build_training(job), job)
        choices = explain_choices(recipe, job)
        with ExitStack() as held:
            with world.together():
                if world.is_main:
                    held.enter_context(directory.locked())
                    check_directory(recipe, directory, resume=resume)  # another may have begun meanwhile
            begin(job, directory, choices, resume=resume)
            train(job, training, directory, tasks)
    return job.recipe


def next_token_nats(
    model: GPT, ids_BT: Tensor, targets_BT: Tensor, head: Head, boundary: int | None = None
) -> Tensor:
    """What pretraining minimises: the cross-entropy of every next token, summed, in nats.

    `boundary` is the id at which a document begins that sees nothing before it; None if a row sees itself.
    """
    documents = None if boundary is None else find_documents(ids_BT, boundary)
    hidden_BTC = model.trunk(ids_BT, documents=documents)
    return nats_of_hidden(hidden_BTC, model.wte.weight, targets_BT, vocab_size=model.vocab_size, head=head)


def build_training(job: Job) -> Training:
    """What the loop needs besides the state. Raises ValueError if the schedule does not fit the run."""
    recipe, plan, device = job.recipe, job.plan, job.recipe.compute.device
    assert device is not None
    assert recipe.schedule.total_steps is not None
    length = plan.full_steps_before(recipe.schedule.total_steps)
    raise_problems(recipe.schedule.problems(length), f"recipe {recipe.run_name}")
    loss = functools.partial(next_token_nats, boundary=job.materials.boundary)
    world, model = job.world, job.state.model
    following = functools.partial(plan.following_row, rank=world.rank, size=world.size)
    return Training(
        batches=read_ahead(job.train.batch, device, following),
        loss=build_loss(model, loss, recipe.compute, by_block=job.sharding in SHARDS),
        plan=plan,
        learning_rate=lambda step: (
            recipe.optimizer.peak_learning_rate
            * learning_rate_multiplier(plan.full_steps_before(step + 1) - 1, length, recipe.schedule)
        ),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        spike_deviations=recipe.guard.spike_deviations,
        seed=recipe.seed,
        device=device,
        world=world,
        add_up=choose_sum(model, job.sharding, bitwise=recipe.compute.bitwise),
        after_update=spread_updates(model, world, job.sharding),
    )


def fit_into_memory(training: Training, job: Job) -> tuple[Training, Job]:
    """Both with the micro-batch halved until a GPU can hold it: tried before the run begins.

    Shards are not tried: there, a process that has no memory left would be waited for. Raises ValueError if
    not even a single row fits.
    """
    if job.sharding in SHARDS:
        return training, job
    while job.world.any(not fits(training, job.state)):
        plan = with_fewer_rows(training.plan, job.recipe.batch, training.device, job.world.size)
        batch = dataclasses.replace(job.recipe.batch, rows_per_micro_batch=plan.rows_per_micro_batch)
        job = dataclasses.replace(job, plan=plan, recipe=dataclasses.replace(job.recipe, batch=batch))
        training = dataclasses.replace(training, plan=plan)
    return training, job


def with_fewer_rows(plan: BatchPlan, batch: BatchConfig, device: str, processes: int = 1) -> BatchPlan:
    """A plan of the same steps with at most half as many rows at once.

    Raises ValueError if there is a single row already.
    """
    at_once = plan.rows_per_micro_batch
    if at_once == 1:
        raise ValueError(
            f"not a single row fits in the memory of {device}: choose --recompute block, "
            "--head chunked, a smaller model or a shorter --context-length"
        )
    open_batch = dataclasses.replace(batch, rows_per_micro_batch=None)
    smaller = plan_batches(open_batch, plan.tokens_per_row, at_once // 2, processes)
    say(
        f"{at_once} rows at once do not fit in the memory of {device}: going on with "
        f"{smaller.rows_per_micro_batch}, and as many tokens a step"
    )
    return smaller


def train(job: Job, training: Training, directory: RunDirectory, tasks: Sequence[RunTask]) -> None:
    """Run the loop to the end, or to a signal, with everything that is to be written on the way."""
    state, total_steps = job.state, job.recipe.schedule.total_steps
    assert total_steps is not None
    world = job.world
    with (
        watched(world.rank, world.size, job.recipe.compute.timeout_seconds) as watch,
        Journal(job, directory, watch, tasks) as journal,
        stop_on_signal() as stopped,
    ):
        journal.evaluate_at_start()
        training = dataclasses.replace(training, go_back=build_go_back(job, directory, journal))
        is_over = functools.partial(is_out_of_time, job.recipe.checkpoints.stop_after, time.monotonic())
        may_not_go_on = functools.partial(is_to_stop, job, lambda: stopped() or is_over(), watch, journal)
        with noting_failure(job, directory):
            fit(state, training, total_steps, journal.hooks(total_steps), may_not_go_on)
            journal.save()
            journal.finish_saving()
        record_text(job, directory)
        reason = "its time limit" if is_over() else "a signal" if stopped() else "a lack of text"
        is_finished = state.step == total_steps
        if world.is_main:
            directory.note_end(state.step, "its last step" if is_finished else reason)
    if not is_finished:
        say(f"stopped and saved after step {state.step} of {total_steps}")
        say(f"next: overnight train --resume {directory.path}")
        raise KeyboardInterrupt


@contextmanager
def noting_failure(job: Job, directory: RunDirectory) -> Iterator[None]:
    """Within, what the run fails by is written down, if the disk takes it."""
    try:
        yield
    except (FloatingPointError, OSError) as error:
        if job.world.is_main:
            with suppress(OSError):
                directory.note_end(job.state.step, f"{type(error).__name__}: {error}")
        raise


def is_out_of_time(stop_after: str | None, begun_at: float) -> bool:
    """True once so long has passed since that moment of the monotonic clock."""
    return stop_after is not None and time.monotonic() - begun_at >= parse_duration(stop_after)


def is_to_stop(job: Job, stopped: Callable[[], bool], watch: Watch, journal: Journal) -> bool:
    """True if any process was told to stop, or if the text of the next step is not there and will not come.

    Waits for text that is being prepared; before that, where there are several processes, for a checkpoint
    under way: they publish it after a step only.
    """
    watch.still_going()
    if not isinstance(job.train, GrowingStream):
        return job.world.any(stopped())
    rows = job.plan.tokens_before(job.state.step + 1) // job.plan.tokens_per_row
    rows += job.state.guard.rows_left_out(job.state.step)
    if job.world.size > 1:
        journal.wait_until_saved()
    with watch.paused():
        return job.world.any(stopped() or not job.train.wait_for(rows, stopped))


def record_text(job: Job, directory: RunDirectory) -> None:
    """Write down by what the text of the run is known again."""
    if job.world.is_main:
        write_atomically(directory.data, json.dumps(job.materials.record(), indent=2) + "\n")


def check_directory(recipe: Recipe, directory: RunDirectory, *, resume: bool) -> None:
    """Raise ValueError unless `directory` is free for a new run, or holds the run that is to go on."""
    path = directory.path
    if not directory.exists():
        if resume:
            raise ValueError(f"there is no run in {path} to resume")
        return
    if not resume:
        raise ValueError(
            f"{path} already holds a run: go on with `overnight train --resume {path}`, "
            "or give another --run-name"
        )
    before = from_toml(Recipe, directory.read_recipe(), str(directory.recipe))
    changed = changed_settings(recipe, before)
    if changed:
        raise ValueError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; "
            "take these back, or give another --run-name"
        )


def check_disk(job: Job, directory: RunDirectory) -> None:
    """Raise ValueError if the checkpoints to be kept, and the one being written, do not fit the disk."""
    assert job.recipe.schedule.total_steps is not None
    wanted = job.recipe.checkpoints.count_kept(job.recipe.schedule.total_steps) + 1
    missing = max(1, wanted - len(list_checkpoints(directory.checkpoints)))
    needed = missing * job.state.model.config.parameter_count() * BYTES_PER_SAVED_PARAMETER
    existing = next(
        folder for folder in (directory.path, *directory.path.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"the disk of {directory.path} has {free / 1e9:.1f} GB free, the checkpoints need "
            f"{needed / 1e9:.1f} GB: free some, or lower --keep-checkpoints"
        )


def begin(job: Job, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool) -> None:
    """Write down what is about to run; with `resume`, become the newest good checkpoint first."""
    state = job.state
    if resume:
        with job.world.together():
            check_text(job, directory)
        newest = read_newest(directory.checkpoints, lambda found: open_checkpoint(found, job.world))
        with job.world.together():
            if newest is not None:
                check_settings(job, directory, newest)
                restore(state, newest)
        check_step(state.step, job.world)
        total_steps = job.recipe.schedule.total_steps or 0
        if state.step > total_steps:
            raise ValueError(
                f"total_steps={total_steps} is fewer than the {state.step} steps that {directory.path} "
                "has done: give more"
            )
    if job.world.is_main:
        write_beginning(job, directory, choices, resume=resume)
    job.world.wait_for_all()
    for name, choice in choices.items():
        say(f"{name.replace('_', ' '):<21} {choice}")


def check_settings(job: Job, directory: RunDirectory, newest: Opened) -> None:
    """Raise ValueError unless the recipe is the one by which it was saved: its file may have been edited."""
    now = lasting_settings(job.recipe)
    changed = [
        f"{name}={now[name]} (was {before})"
        for name, before in newest.settings.items()
        if name in now and now[name] != before
    ]
    if changed:
        raise ValueError(
            f"{directory.recipe} is not the recipe that the newest checkpoint was trained by: "
            f"{'; '.join(changed)}; take these back, or begin another run with --run-name"
        )


def check_text(job: Job, directory: RunDirectory) -> None:
    """Raise ValueError unless text and tokenizer are those of the run that is to go on."""
    materials, path = job.materials, directory.path
    now = json.loads(json.dumps(materials.record()))
    try:
        before = json.loads(directory.data.read_text(encoding="utf-8"))
        is_same = is_same_text(before, now)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{directory.data} is damaged: take it from a copy of the run") from None
    if not is_same:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise ValueError(
            f"the data in {materials.folder} is not what {path} was trained on: other {', '.join(names)}; "
            "put that data back, or give another --run-name"
        )
    if not (directory.tokenizer / "tokenizer.json").is_file():
        return  # it is about to be written again
    try:
        is_same = load_tokenizer(directory.tokenizer).fingerprint == materials.tokenizer.fingerprint
    except ValueError:  # damaged
        is_same = False
    if not is_same:
        raise ValueError(
            f"{directory.tokenizer} is not the tokenizer that {path} was trained with: delete that folder, "
            "and it is written again"
        )


def check_step(step: int, world: World) -> None:
    """Raise ValueError unless all processes go on from the same checkpoint."""
    steps = world.gather(str(step))
    if len({*steps}) > 1:
        raise ValueError(
            f"the processes have loaded checkpoints of different steps ({', '.join(steps)}): a run's folder "
            "must lie on a disk that all of them see, and see alike"
        )


def write_beginning(job: Job, directory: RunDirectory, choices: Mapping[str, str], *, resume: bool) -> None:
    """The run's files as they are to be at the step that it is at."""
    state, materials = job.state, job.materials
    if resume:
        discard_checkpoints_after(state.step, directory.checkpoints)
        directory.rewind(state.step)
    if not resume or not (directory.tokenizer / "tokenizer.json").is_file():
        materials.tokenizer.save(directory.tokenizer)  # of a new run also where a failed command has left one
    record_text(job, directory)
    before = json.loads(directory.environment.read_text(encoding="utf-8")) if resume else None
    parameters = state.model.config.parameter_count()
    environment = describe_environment(job.recipe.compute, parameters, choices, before)
    device = job.world.device.partition(":")[0] if job.world.is_joined else job.world.device
    compute = dataclasses.replace(job.recipe.compute, device=device)
    directory.begin(to_toml(dataclasses.replace(job.recipe, compute=compute)), environment)
