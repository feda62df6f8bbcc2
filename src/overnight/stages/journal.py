"""What a run writes down while it trains: metrics, evaluations, samples, checkpoints, and a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

from overnight.checkpoint import save_checkpoint
from overnight.evaluation.language_model import evaluate_language_model, evaluation_rows
from overnight.generate import Decoding, complete
from overnight.hardware import find_device_name, peak_flops
from overnight.run_directory import RunDirectory
from overnight.sampling import SamplingConfig
from overnight.stages.materials import Materials
from overnight.stages.recipe import Recipe, flatten
from overnight.state import TrainState
from overnight.terminal import progress, say
from overnight.tracking import open_trackers
from overnight.trainer import Hook, StepResult, every


class Journal:
    """A run's periodic work, as hooks of the loop. Entered as a context: it owns the bar and the trackers."""

    def __init__(
        self, recipe: Recipe, state: TrainState, directory: RunDirectory, materials: Materials
    ) -> None:
        self.recipe = recipe
        self.state = state
        self.directory = directory
        self.materials = materials
        self.validation = materials.stream("validation", state.model.config.context_length, recipe.seed)
        self.saved_step: int | None = None
        assert recipe.compute.device is not None and recipe.compute.precision is not None
        peak = peak_flops(find_device_name(recipe.compute.device), recipe.compute.precision)
        self.tokens_per_second_at_peak = peak / state.model.config.flops_per_token() if peak else None

    def __enter__(self) -> Journal:
        total = self.recipe.schedule.total_steps
        assert total is not None
        self._open = ExitStack()
        self._track: Callable[[int, Mapping[str, float]], None] = self._open.enter_context(
            open_trackers(
                self.recipe.trackers, self.directory.path, self.recipe.run_name, flatten(self.recipe)
            )
        )
        self._advance = self._open.enter_context(progress("train", total - self.state.step, "steps"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def hooks(self, total_steps: int) -> list[Hook]:
        """In this order: a checkpoint is published after everything else its step has written."""
        recipe = self.recipe
        if self.state.step == 0 and recipe.evaluation.evaluate_every_steps is not None:
            self.evaluate()
        return [
            self.log,
            every(recipe.evaluation.evaluate_every_steps, self.evaluate, total_steps),
            every(recipe.samples.sample_every_steps, self.sample, total_steps),
            every(recipe.checkpoints.checkpoint_every_steps, self.save, total_steps),
        ]

    def log(self, result: StepResult) -> None:
        """The step's one metrics line."""
        tokens_per_second = result.tokens / result.seconds
        line: dict[str, float] = {
            "step": result.step,
            "tokens": result.step * result.tokens,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "milliseconds": round(1000 * result.seconds, 3),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if self.tokens_per_second_at_peak:
            line["mfu"] = round(tokens_per_second / self.tokens_per_second_at_peak, 4)
        self.directory.append_metrics(line)
        self._track(result.step, line)
        self._advance(1, f"loss {result.loss:.3f}  {tokens_per_second:,.0f} tokens/s")

    def evaluate(self) -> None:
        """Judge the model on the validation split and write the result down."""
        evaluation = evaluate_language_model(
            self.state.model,
            self.validation.evaluation_batches(
                evaluation_rows(self.state.model), self.recipe.evaluation.evaluation_tokens
            ),
            self.materials.tokenizer.token_bytes(),
            self.recipe.compute.precision or "fp32",
        )
        values = dataclasses.asdict(evaluation)
        self._event("evaluations", values)
        self._track(self.state.step, {f"validation/{name}": value for name, value in values.items()})
        say(
            f"step {self.state.step:>6}  validation loss {evaluation.loss:.4f}  "
            f"{evaluation.bits_per_byte:.4f} bits per byte"
        )

    def sample(self) -> None:
        """Continue every prompt; the noise is a function of the seed and the step."""
        samples = self.recipe.samples
        decoding = Decoding(
            max_new_tokens=samples.sample_tokens,
            sampling=SamplingConfig(seed=self.recipe.seed + self.state.step),
        )
        written = complete(self.state.model, self.materials.tokenizer, samples.sample_prompts, decoding)
        for prompt, completion in zip(samples.sample_prompts, written, strict=True):
            self._event("samples", {"prompt": prompt, "completion": completion.text})

    def save(self) -> None:
        """Publish a checkpoint of this step, once."""
        if self.saved_step == self.state.step:
            return
        self.directory.flush()
        save_checkpoint(self.state, self.directory.checkpoints, self.recipe.checkpoints.keep_checkpoints)
        self.saved_step = self.state.step

    def _event(self, kind: str, values: Mapping[str, object]) -> None:
        tokens = self.state.step * self.recipe.batch.tokens_per_step
        self.directory.append_event(kind, {"step": self.state.step, "tokens": tokens, **values})
