"""What a run writes while it trains: metrics, evaluations, samples, checkpoints, and a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from types import TracebackType

from overnight.baselines.band import columns_of, find_band
from overnight.baselines.verdict import compare_with_band
from overnight.distributed.watchdog import Watchdog
from overnight.evaluation.results import describe_briefly
from overnight.evaluation.scores import bootstrap
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, complete
from overnight.hardware import find_peak_flops
from overnight.recipe import flatten, frozen_settings
from overnight.run.evaluate import (
    RunTask,
    describe_weights,
    evaluate_run_tasks,
    evaluate_validation,
    score_event,
)
from overnight.run.setup import RunSetup
from overnight.run_directory import RunDirectory
from overnight.terminal import echo, progress, short
from overnight.trackers import open_trackers
from overnight.training.checkpoint.format import keep_only, list_checkpoints, read_step, retained_steps
from overnight.training.checkpoint.save import Saver
from overnight.training.sharding import FULLY_SHARDED, gather_model
from overnight.training.step import StepResult, derive_seed


class RunLog:
    """A run's log. As a context manager it owns the progress bar, the trackers and the running save."""

    def __init__(
        self, run: RunSetup, directory: RunDirectory, watch: Watchdog, tasks: Sequence[RunTask] = ()
    ) -> None:
        self.run, self.directory, self._watch, self._tasks = run, directory, watch, tasks
        self._saved_step = run.state.step if list_checkpoints(directory.checkpoints) else None
        compute, settings = run.resolved.compute, flatten(run.resolved.recipe)
        self._peak_flops = find_peak_flops(compute.device, compute.precision)
        self._saver = Saver(
            directory.checkpoints,
            run.world,
            directory.flush,
            self._delete_old,
            frozen_settings(run.resolved.recipe),
        )
        self._band = find_band(settings, run.dataset.record())

    def __enter__(self) -> RunLog:
        resolved, is_main = self.run.resolved, self.run.world.is_main
        recipe, plan = resolved.recipe, resolved.plan
        self._open = ExitStack()
        self._track = self._open.enter_context(
            open_trackers(
                recipe.trackers if is_main else (), self.directory.path, recipe.run_name, flatten(recipe)
            )
        )
        # Counted in tokens, so that the estimated time is right during a batch ramp.
        tokens = plan.tokens_before(resolved.total_steps) - plan.tokens_before(self.run.state.step)
        self._advance = self._open.enter_context(progress("train", tokens))
        first = f"step {min(self.run.state.step + 1, resolved.total_steps):,} of {resolved.total_steps:,}"
        self._advance(0, f"{first}  compiling" if resolved.compute.compile else first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self._saver.abandon()
        self._open.__exit__(kind, error, trace)

    def after_step(self, result: StepResult) -> None:
        """Log a step and do what is due after it; a checkpoint comes after the files it refers to."""
        recipe = self.run.resolved.recipe
        tasks_every = recipe.evaluation.tasks_every_steps or recipe.evaluation.evaluate_every_steps
        self.log_metrics(result)
        self._saver.poll()
        if self._is_due(result.step, recipe.evaluation.evaluate_every_steps):
            self.evaluate()
        if self._tasks and self._is_due(result.step, tasks_every):
            self.evaluate_tasks()
        if self._is_due(result.step, recipe.samples.sample_every_steps):
            self.sample()
        is_sound = not self.run.state.guard.bad_steps  # else the weights may be damaged
        if is_sound and self._is_due(result.step, recipe.checkpoints.checkpoint_every_steps):
            self.save()

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self.run.resolved.total_steps)

    def evaluate_at_start(self) -> None:
        """Evaluate the untrained model of a new run."""
        is_on = self.run.resolved.recipe.evaluation.evaluate_every_steps is not None
        if is_on and self.run.state.step == 0 and not self.directory.read_events("evaluations"):
            self.evaluate()

    def log_metrics(self, result: StepResult) -> None:
        """Write the step's metrics line."""
        if not self.run.world.is_main:
            return
        tokens_per_second = result.tokens / result.seconds
        line: dict[str, float] = {
            "step": result.step,
            "tokens": self.run.resolved.plan.tokens_before(result.step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "milliseconds": round(1000 * result.seconds, 3),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if not result.is_applied:
            line["skipped"] = True
        if self._peak_flops is not None:
            line |= self._utilization(tokens_per_second / self._peak_flops / self.run.world.size)
        self.directory.append_metrics(line)
        self._track(result.step, line)
        step = f"step {result.step:,} of {self.run.resolved.total_steps:,}"
        about = f"{step}  loss {result.loss:.3f}  {short(tokens_per_second)} tokens/s"
        self._advance(result.tokens, about)

    def _utilization(self, tokens_per_flop: float) -> dict[str, float]:
        """MFU by both definitions: from the model's size, and from the executed operations."""
        model, compute = self.run.resolved.model, self.run.resolved.compute
        executed = model.executed_flops_per_token(compute.activation_checkpointing)
        flops = {"mfu": model.flops_per_token(), "mfu_executed": executed}
        return {name: round(count * tokens_per_flop, 4) for name, count in flops.items()}

    def evaluate(self) -> None:
        """Evaluate the held-out split, and record the result with the weights' statistics."""
        run, state = self.run, self.run.state
        loss, by_source = evaluate_validation(run, self._watch)
        evaluation, interval = loss.summary(), bootstrap(loss.nats, loss.tokens)
        values = dataclasses.asdict(evaluation) | describe_weights(state.model, run.world)
        values["applied_learning_rate"] = state.optimizer.param_groups[0]["lr"]
        tracked = {f"validation/{name}": value for name, value in values.items()}
        tracked |= {f"validation/loss/{line['source']}": line["loss"] for line in by_source}
        self._track(state.step, tracked)
        echo(
            f"step {state.step:>6}  validation loss {evaluation.loss:.4f}  "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )
        for line in by_source:
            echo(f"{line['loss']:>29.4f}  {line['source']}, {line['epochs']:.2f} epochs seen")
        sources = {"by_source": by_source} if by_source else {}
        ends = {"low": interval.low, "high": interval.high} if interval else {"low": None, "high": None}
        self._event("evaluations", values | ends | sources | self._compare_with_band(values))

    def _compare_with_band(self, values: Mapping[str, float]) -> dict[str, str | None]:
        """Where the run is relative to its reference band, if there is one; printed when it changes."""
        if self._band is None or not self.run.world.is_main:
            return {}
        before = self.directory.read_events("evaluations")
        now = {"tokens": self.run.resolved.plan.tokens_before(self.run.state.step), **values}
        columns = columns_of(self.directory.read_metrics())
        settings = flatten(self.run.resolved.recipe)
        comparison = compare_with_band(self._band, columns, [*before, now], settings)
        if comparison is None:
            return {}
        brief = comparison.brief()
        last = {name: before[-1].get(name) for name in brief} if before else {}
        if brief != last and (last.get("on_track") or not comparison.is_on_track):
            echo(f"{'':>13}{comparison.line()}")
        return brief

    def evaluate_tasks(self) -> None:
        """Evaluate the recipe's tasks, and record each metric with its confidence interval."""
        scores = evaluate_run_tasks(self.run, self._tasks, self._watch)
        for score in scores:
            self._event("tasks", score_event(score))
        self._track(self.run.state.step, {f"{score.task}/{score.metric}": score.value for score in scores})
        for _, of_task in groupby(scores, key=lambda score: score.task):
            echo(f"{'':>13}{describe_briefly(next(of_task))}")

    def sample(self) -> None:
        """Continue every prompt; the noise is a function of the seed, the step and the prompt's index."""
        run, samples, world = self.run, self.run.resolved.recipe.samples, self.run.world
        prompts = samples.sample_prompts
        if run.resolved.compute.sharding in FULLY_SHARDED:
            model, (first, end) = gather_model(run.state.model, world), (0, len(prompts))
        else:
            model = run.state.model
            first, end = (len(prompts) * rank // world.size for rank in (world.rank, world.rank + 1))
        decoding = Decoding(
            max_new_tokens=samples.sample_tokens,
            sampling=SamplingConfig(seed=derive_seed(run.resolved.recipe.seed, run.state.step)),
            first_row=first,
        )
        written = complete(model, run.dataset.tokenizer, prompts[first:end], decoding) if model else []
        texts = chain(*world.all_gather_object([completion.text for completion in written]))
        for prompt, text in zip(prompts, texts, strict=True):
            self._event("samples", {"prompt": prompt, "completion": text})

    def save(self) -> None:
        """Start a checkpoint of this step unless there is one; wait for it if the recipe says so."""
        state = self.run.state
        if self._saved_step != state.step:
            self._saver.save(state)
            self._saved_step = state.step
        if not self.run.resolved.recipe.checkpoints.async_checkpoint:
            self.wait_for_checkpoint()

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint being written, if any, is published."""
        self._saver.wait()

    def finish_checkpoints(self) -> None:
        """Wait for the checkpoint; then delete old ones, including those left by a killed run."""
        self.wait_for_checkpoint()
        if self.run.world.is_main:
            self._delete_old()

    def state_restored(self) -> None:
        """Report that the state was restored from a checkpoint."""
        self._saved_step = self.run.state.step

    def _delete_old(self) -> None:
        """Delete the checkpoints that the recipe does not keep."""
        config, folder = self.run.resolved.recipe.checkpoints, self.directory.checkpoints
        steps = [read_step(checkpoint) for checkpoint in list_checkpoints(folder)]
        lines = self.directory.read_events("evaluations")
        losses = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
        evaluated = [step for step in steps if step in losses]
        best = min(evaluated, key=lambda step: losses[step]) if evaluated and config.keep_best else None
        keep_only(retained_steps(steps, config.keep_checkpoints, config.keep_every_steps, best), folder)

    def _event(self, kind: str, values: Mapping[str, object]) -> None:
        if self.run.world.is_main:
            step = self.run.state.step
            tokens = self.run.resolved.plan.tokens_before(step)
            self.directory.append_event(kind, {"step": step, "tokens": tokens, **values})
