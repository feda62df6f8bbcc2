"""What a run writes down while it trains: metrics, evaluations, samples, checkpoints, and a progress bar."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from overnight.baselines.band import columns_of, find_band
from overnight.baselines.verdict import compare_with_band
from overnight.data.loader import Batch, TokenStream
from overnight.data.mixture import Concatenation, Mixture
from overnight.distributed.watchdog import Watchdog
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.page import describe_briefly
from overnight.evaluation.perplexity import (
    Evaluation,
    evaluate_language_model,
    evaluation_rows,
    pool_evaluations,
)
from overnight.evaluation.scores import Score
from overnight.evaluation.tasks import (
    HARNESS,
    Example,
    Numbers,
    Task,
    TaskResult,
    evaluate_task,
    open_tasks,
    split_names,
)
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, complete
from overnight.hardware import find_peak_flops
from overnight.model.gpt import GPT
from overnight.recipe import EvaluationConfig, flatten, frozen_settings
from overnight.run.setup import TrainSetup
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, progress
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.trackers import open_trackers
from overnight.training.checkpoint.format import keep_only, list_checkpoints, read_step, retained_steps
from overnight.training.checkpoint.save import Saver
from overnight.training.sharding import SHARDS, gather_model, reshard
from overnight.training.state import local_shard
from overnight.training.step import Hook, StepResult, derive_seed, every


class RunLog:
    """A run's periodic work, as hooks of the loop. Entered as a context: it owns the bar and the trackers."""

    def __init__(
        self, job: TrainSetup, directory: RunDirectory, watch: Watchdog, tasks: Sequence[RunTask] = ()
    ) -> None:
        self.job, self.directory, self._watch, self._tasks = job, directory, watch, tasks
        self.saved_step = job.state.step if list_checkpoints(directory.checkpoints) else None
        compute = job.recipe.compute
        assert compute.device is not None
        assert compute.precision is not None
        self.peak_flops = find_peak_flops(compute.device, compute.precision)
        settings = frozen_settings(job.recipe)
        self._saver = Saver(directory.checkpoints, job.world, directory.flush, self._delete_old, settings)
        self._reference = find_band(flatten(job.recipe), job.dataset.record())

    def __enter__(self) -> RunLog:
        recipe, plan, total_steps = self.job.recipe, self.job.plan, self.job.recipe.schedule.total_steps
        assert total_steps is not None
        self._open = ExitStack()
        trackers = recipe.trackers if self.job.world.is_main else ()
        self._track: Callable[[int, Mapping[str, float]], None] = self._open.enter_context(
            open_trackers(trackers, self.directory.path, recipe.run_name, flatten(recipe))
        )
        # Counted in tokens, so that the time left is right while the steps still grow.
        tokens = plan.tokens_before(total_steps) - plan.tokens_before(self.job.state.step)
        self._advance = self._open.enter_context(progress("train", tokens))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self._saver.settle()
        self._open.__exit__(kind, error, trace)

    def hooks(self, total_steps: int) -> list[Hook]:
        """In this order: a checkpoint is published after everything else its step has written."""
        recipe = self.job.recipe
        return [
            self.log,
            lambda _: self._saver.look(),
            every(recipe.evaluation.evaluate_every_steps, self.evaluate, total_steps),
            every(self._steps_between_tasks(), self.judge_tasks, total_steps),
            every(recipe.samples.sample_every_steps, self.sample, total_steps),
            every(recipe.checkpoints.checkpoint_every_steps, self.save_if_sound, total_steps),
        ]

    def evaluate_at_start(self) -> None:
        """The loss of knowing nothing, before the first step of a new run."""
        is_on = self.job.recipe.evaluation.evaluate_every_steps is not None
        if is_on and self.job.state.step == 0 and not self.directory.read_events("evaluations"):
            self.evaluate()

    def log(self, result: StepResult) -> None:
        """The step's one metrics line."""
        if not self.job.world.is_main:
            return
        tokens_per_second = result.tokens / result.seconds
        line: dict[str, float] = {
            "step": result.step,
            "tokens": self.job.plan.tokens_before(result.step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "milliseconds": round(1000 * result.seconds, 3),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if not result.is_applied:
            line["skipped"] = True
        if self.peak_flops is not None:
            line |= self._shares_of_peak(tokens_per_second / self.peak_flops / self.job.world.size)
        self.directory.append_metrics(line)
        self._track(result.step, line)
        about = f"step {result.step:,}  loss {result.loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._advance(result.tokens, about)

    def evaluate(self) -> None:
        """Judge the model on the validation split and write the result down; each source of several, too."""
        job, wanted = self.job, self.job.recipe.evaluation.evaluation_tokens
        if isinstance(job.validation, Concatenation):
            streams = zip(job.validation.streams, job.validation.evaluation_tokens(wanted), strict=True)
            parts = [self._judge(stream, tokens) for stream, tokens in streams]
        else:
            parts = [self._judge(job.validation, wanted)]
        evaluation = parts[0] if len(parts) == 1 else pool_evaluations(parts)
        values = dataclasses.asdict(evaluation) | describe_weights(job.state.model, job.world)
        values["applied_learning_rate"] = job.state.optimizer.param_groups[0]["lr"]
        by_source = describe_sources(job, parts)
        losses = {f"validation/loss/{line['source']}": line["loss"] for line in by_source}
        self._track(job.state.step, {f"validation/{name}": value for name, value in values.items()} | losses)
        echo(
            f"step {job.state.step:>6}  validation loss {evaluation.loss:.4f}  "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )
        for line in by_source:
            echo(f"{line['loss']:>29.4f}  {line['source']}, {line['epochs']:.2f} epochs seen")
        beside = {"by_source": by_source} if by_source else {}
        self._event("evaluations", values | beside | self._compare(values))

    def _compare(self, values: Mapping[str, float]) -> dict[str, str | None]:
        """How the run lies beside its reference, if there is one; told where that has changed."""
        if self._reference is None or not self.job.world.is_main:
            return {}
        before = self.directory.read_events("evaluations")
        now = {"tokens": self.job.plan.tokens_before(self.job.state.step), **values}
        columns = columns_of(self.directory.read_metrics())
        verdict = compare_with_band(self._reference, columns, [*before, now], flatten(self.job.recipe))
        if verdict is None:
            return {}
        brief = verdict.brief()
        told = {name: before[-1].get(name) for name in brief} if before else {}
        if brief != told and (told.get("on_track") or not verdict.is_on_track):
            echo(f"{'':>13}{verdict.line()}")
        return brief

    def _steps_between_tasks(self) -> int | None:
        evaluation = self.job.recipe.evaluation
        return (evaluation.tasks_every_steps or evaluation.evaluate_every_steps) if self._tasks else None

    def judge_tasks(self) -> None:
        """Judge the model on the recipe's tasks, and write each metric down with its interval."""
        scores = evaluate_run_tasks(self.job, self._tasks, self._watch)
        for score in scores:
            self._event(
                "tasks",
                {
                    "task": score.task,
                    "metric": score.metric,
                    "value": score.value,
                    "low": score.interval.low,
                    "high": score.interval.high,
                    "method": score.interval.method,
                    "examples": score.examples,
                    "chance": score.chance,
                },
            )
        self._track(self.job.state.step, {f"{score.task}/{score.metric}": score.value for score in scores})
        for task in dict.fromkeys(score.task for score in scores):
            score = next(score for score in scores if score.task == task)
            echo(f"{'':>13}{describe_briefly(score)}")

    def _judge(self, stream: TokenStream, tokens: int | None) -> Evaluation:
        job, model, dataset = self.job, self.job.state.model, self.job.dataset
        batches = stream.evaluation_batches(evaluation_rows(model), tokens)
        precision = job.recipe.compute.precision or "fp32"
        token_bytes, document_separator = dataset.tokenizer.token_bytes(), dataset.document_separator
        found = evaluate_language_model(
            model, self._watched(batches), token_bytes, precision, document_separator, world=job.world
        )
        reshard(model)
        return found

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same; each is a sign of life."""
        for batch in batches:
            self._watch.heartbeat()
            yield batch

    def sample(self) -> None:
        """Continue every prompt; the noise is a function of the seed, the step and the prompt's place."""
        job, samples = self.job, self.job.recipe.samples
        world, prompts = job.world, samples.sample_prompts
        if job.sharding in SHARDS:
            model, (first, end) = gather_model(job.state.model, world), (0, len(prompts))
        else:
            model = job.state.model
            first, end = (len(prompts) * rank // world.size for rank in (world.rank, world.rank + 1))
        decoding = Decoding(
            max_new_tokens=samples.sample_tokens,
            sampling=SamplingConfig(seed=derive_seed(job.recipe.seed, job.state.step)),
            first_row=first,
        )
        written = complete(model, job.dataset.tokenizer, prompts[first:end], decoding) if model else []
        told = world.all_gather_object(json.dumps([completion.text for completion in written]))
        texts = [text for share in told for text in json.loads(share)]
        for prompt, text in zip(prompts, texts, strict=True):
            self._event("samples", {"prompt": prompt, "completion": text})

    def save(self) -> None:
        """Begin a checkpoint of this step, once; it is published soon, or, if the recipe says so, now."""
        state = self.job.state
        if self.saved_step != state.step:
            self._saver.save(state)
            self.saved_step = state.step
        if not self.job.recipe.checkpoints.async_checkpoint:
            self.wait_until_saved()

    def wait_until_saved(self) -> None:
        """Return when what was begun is published."""
        self._saver.finish()

    def finish_saving(self) -> None:
        """The same; and old ones are gone, also those that a killed run has left."""
        self.wait_until_saved()
        if self.job.world.is_main:
            self._delete_old()

    def _delete_old(self) -> None:
        """Of the checkpoints, keep what the recipe asks for."""
        config, folder = self.job.recipe.checkpoints, self.directory.checkpoints
        steps = [read_step(checkpoint) for checkpoint in list_checkpoints(folder)]
        lines = self.directory.read_events("evaluations")
        losses = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
        judged = [step for step in steps if step in losses]
        best = min(judged, key=lambda step: losses[step]) if judged and config.keep_best else None
        keep_only(retained_steps(steps, config.keep_checkpoints, config.keep_every_steps, best), folder)

    def save_if_sound(self) -> None:
        """`save`, unless the last steps went wrong: what they may have spoilt is no place to go back to."""
        if not self.job.state.guard.bad_steps:
            self.save()

    def note_return(self) -> None:
        """The state is that of a checkpoint again."""
        self.saved_step = self.job.state.step

    def _shares_of_peak(self, tokens_per_flop: float) -> dict[str, float]:
        """MFU by both definitions: of a model's arithmetic by its size, and of what is really executed."""
        model, activation_checkpointing = (
            self.job.state.model.config,
            self.job.recipe.compute.activation_checkpointing,
        )
        flops = {
            "mfu": model.flops_per_token(),
            "mfu_executed": model.executed_flops_per_token(activation_checkpointing),
        }
        return {name: round(count * tokens_per_flop, 4) for name, count in flops.items()}

    def _event(self, kind: str, values: Mapping[str, object]) -> None:
        if not self.job.world.is_main:
            return
        step = self.job.state.step
        tokens = self.job.plan.tokens_before(step)
        self.directory.append_event(kind, {"step": step, "tokens": tokens, **values})


def describe_sources(job: TrainSetup, parts: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Of each source of a mixture: its validation loss, and how much of it was trained on; [] of one text."""
    if not isinstance(job.train, Mixture):
        return []
    rows = job.plan.tokens_before(job.state.step) // job.plan.tokens_per_row
    seen = zip(
        job.train.names, parts, job.train.rows_of_each(rows), job.train.epochs_of_each(rows), strict=True
    )
    return [
        {
            "source": name,
            "loss": part.loss,
            "evaluated_tokens": part.evaluated_tokens,
            "tokens": count * job.plan.tokens_per_row,
            "epochs": round(epochs, 6),
        }
        for name, part, count, epochs in seen
    ]


# ---------------------------------------------------------------- tasks that a run is judged on while it trains


@dataclass(frozen=True)
class RunTask:
    """A task, its examples as ids."""

    task: Task
    examples: Sequence[Example]


def open_run_tasks(config: EvaluationConfig, tokenizer: Tokenizer, context_length: int) -> list[RunTask]:
    """The tasks of a recipe. Raises ValueError for one that there is not, or whose file is not there."""
    if not config.tasks:
        return []
    names = split_names(config.tasks)
    if names.harness or names.validation:
        raise ValueError(
            f"tasks={', '.join(config.tasks)}: a run is judged on validation text by evaluate_every_steps, "
            f"and on {HARNESS}NAME only by `overnight evaluate`"
        )
    tasks = open_tasks(names.own, config.task_files, config.task_examples)
    return [RunTask(task, task.encode(tokenizer, context_length)) for task in tasks]


def evaluate_run_tasks(job: TrainSetup, tasks: Sequence[RunTask], watch: Watchdog) -> list[Score]:
    """What the model as it is now makes of each; the same in all processes.

    They divide the examples; of a model in shards, the first process judges all of it.
    """
    is_whole = job.sharding not in SHARDS
    model = job.state.model if is_whole else gather_model(job.state.model, job.world)
    found: list[Score] = []
    for each in tasks:
        mine = list(_judge_share(each, model, job, SINGLE_PROCESS if not is_whole else job.world, watch))
        with watch.paused() if job.world.size > 1 else nullcontext():
            told = job.world.all_gather_object(json.dumps(mine))
        numbers = {place: tuple(values) for share in told for place, values in json.loads(share)}
        judgement = TaskResult(each.examples, [numbers[place] for place in range(len(each.examples))])
        found += each.task.score(judgement, None)
    return found


def _judge_share(
    each: RunTask, model: GPT | None, job: TrainSetup, world: World, watch: Watchdog
) -> Iterator[tuple[int, Numbers]]:
    """What falls to this process; each example is a sign of life."""
    if model is None:
        return
    precision = job.recipe.compute.precision or "fp32"
    for pair in evaluate_task(model, each.examples, precision, world):
        watch.heartbeat()
        yield pair


# ---------------------------------------------------------------- a few numbers about a model's weights, in which mistakes show that its loss hides


NORM_GAINS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
INTO_RESIDUAL = ("attn.c_proj.weight", "mlp.c_proj.weight")
BESIDE_RESIDUAL = ("mlp.c_fc.weight",)


@torch.no_grad()
def describe_weights(model: GPT, world: World) -> dict[str, float]:
    """The mean gain of all layer norms, and the residual ratio.

    That is the standard deviation of the weights that write into the residual stream by that of c_fc's: at
    the start 1 / sqrt(2 n_layer). All processes must call it, for of shards each adds up its own.
    """
    kinds = (NORM_GAINS, INTO_RESIDUAL, BESIDE_RESIDUAL)
    sums = torch.zeros(len(kinds), 3, device=model.wte.weight.device)
    for name, parameter in model.named_parameters():
        for kind, endings in enumerate(kinds):
            if name.endswith(endings):
                rows = local_shard(parameter.detach())[0].float()
                sums[kind] += torch.stack([sums.new_tensor(rows.numel()), rows.sum(), rows.square().sum()])
    world.all_reduce([sums])
    gains, into, beside = sums.cpu().tolist()
    ratio = _deviation(into) / (
        _deviation(beside) or math.nan
    )  # weights of which nothing is left but infinity
    return {"norm_gain": gains[1] / gains[0], "residual_ratio": ratio}


def _deviation(sums: list[float]) -> float:
    """The standard deviation, from (count, sum, sum of squares)."""
    count, total, squares = sums
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
