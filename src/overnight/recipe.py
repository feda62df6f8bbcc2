"""A training recipe: every setting of a run, its sections standing beside the code they configure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Set
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from overnight.config import field_types, flat_names, from_toml, nearest, parse_duration
from overnight.data import DataConfig
from overnight.model.model_config import ModelConfig
from overnight.run_directory import RunDirectory
from overnight.trackers import find_problems
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training.batch import BatchConfig
from overnight.training.guard import GuardConfig
from overnight.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the run is judged on text it has not seen."""

    evaluate_every_steps: int | None = 250
    """Steps between evaluations; there is one before the first step and one after the last, too."""
    evaluation_tokens: int | None = None
    """How many validation tokens, always the same ones; all of them if left out."""
    tasks: tuple[str, ...] = ()
    """Judge the run on these as well: hellaswag, lambada, ...; `overnight evaluate --help` names all."""
    tasks_every_steps: int | None = None
    """Steps between judging tasks, and after the last; with each evaluation if left out."""
    task_examples: int | None = None
    """The first so many of each task (thousand characters of a text); all if left out."""
    task_files: str | None = None
    """A folder that holds the tasks' official files; fetched once if left out."""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """When the run writes text, to be read beside its loss."""

    sample_every_steps: int | None = None
    """Steps between samples, and after the last; off if left out."""
    sample_prompts: tuple[str, ...] = ("",)
    """Each is continued; an empty one begins a document."""
    sample_tokens: int = 64
    """Length of a sample."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """When the run is saved. It is saved after its last step, and when it is interrupted, in any case."""

    checkpoint_every_steps: int | None = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int | None = 2
    """How many of the newest are kept; all if left out."""
    keep_every_steps: int | None = None
    """Keep those of every so many steps besides."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss besides, of those there are when it is evaluated."""
    async_checkpoint: bool = True
    """Go on training while a checkpoint is written, from a copy in the host's memory; else wait for it."""
    max_time: str | None = None
    """Save and stop after the step at which the command has run for so long: 7h50m, 90m, 1d12h."""

    def count_kept(self, steps: int) -> int:
        """How many checkpoints a run of so many steps has in the end, the last one included, at the most."""
        saved = -(-steps // self.checkpoint_every_steps) if self.checkpoint_every_steps else 1
        if self.keep_checkpoints is None:
            return saved
        besides = steps // self.keep_every_steps if self.keep_every_steps else 0
        return min(saved, self.keep_checkpoints + besides + self.keep_best)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run."""

    run_name: str = ""
    """The run's folder under runs/; the recipe's own name if left out."""
    seed: int = 1337
    """Of the weights, the order of the data, the dropout and the samples."""
    init_from: str | None = None
    """Begin with this model's weights: a run, a checkpoint, a Hugging Face folder or name. Also --from."""
    trackers: tuple[str, ...] = ()
    """Send the metrics elsewhere as well: tensorboard, wandb, trackio."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = self.data.problems() + self.model.problems() + self.optimizer.problems()
        found += self.schedule.problems()
        found += self.batch.problems() + self.guard.problems() + find_problems(self.trackers)
        if self.guard.spike_sigma is not None and self.compute.precision == "fp16":
            found.append("spike_sigma does not go with precision=fp16, whose scaler decides: choose bf16")
        if self.compute.deterministic_reduce and self.batch.micro_batch_size is None:
            found.append(
                "deterministic_reduce=True needs micro_batch_size: what a machine can hold depends on the number of "
                "processes, and the rounding on it"
            )
        try:
            parse_duration(self.checkpoints.max_time or "0s")
        except ValueError as error:
            found.append(f"max_time: {error}")
        if not self.run_name or Path(self.run_name).name != self.run_name or self.run_name.startswith("."):
            found.append(f"run_name={self.run_name!r} must be the plain name of a folder")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} must be at least 0 and less than 2^63")
        flat = flatten(self)
        found += [
            f"{name}={value} must be less than 2^63"
            for name, value in flat.items()
            if isinstance(value, int) and value >= 2**63 and name != "seed"
        ]
        for name in flat:
            is_count = name.endswith("_every_steps") or name in AT_LEAST_ONE
            if is_count and (count := flat[name]) is not None and count < 1:  # type: ignore[operator]
                found.append(f"{name}={count} must be at least 1, or left out")
        return found


AT_LEAST_ONE = frozenset({"evaluation_tokens", "task_examples", "sample_tokens", "keep_checkpoints"})

RESUME_MUTABLE = frozenset(
    {"total_steps", "total_tokens", "trackers", "device", "compile", "attention", "micro_batch_size"}
    | {"cache_bytes", "processes", "sharding", "timeout_seconds", "max_restarts"}
    | {
        field.name
        for part in (EvaluationConfig, SamplesConfig, CheckpointsConfig)
        for field in dataclasses.fields(part)
    }
)
"""Settings that a resumed run may have otherwise than before: how long, on what, and what is written down."""


def flatten(recipe: Recipe) -> dict[str, object]:
    """Every setting by its flat name."""
    found = {}
    for name, section in flat_names(Recipe).items():
        found[name] = getattr(getattr(recipe, section) if section else recipe, name)
    return found


def frozen_settings(recipe: Recipe) -> dict[str, object]:
    """Those that may not change in the course of a run, as JSON has them; but for names of places."""
    may_differ = RESUME_MUTABLE | {
        "run_name",
        "init_from",
        "data",
    }  # which may be moved; text is compared itself
    lasting = {name: value for name, value in flatten(recipe).items() if name not in may_differ}
    return dict(json.loads(json.dumps(lasting, default=dataclasses.asdict)))


def incompatible_settings(recipe: Recipe, before: Recipe) -> list[str]:
    """Settings that differ and may not, as "name=now (was before)"."""
    now, then = flatten(recipe), flatten(before)
    return [
        f"{name}={now[name]} (was {then[name]})"
        for name in now
        if name not in RESUME_MUTABLE and now[name] != then[name]
    ]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("overnight") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or the .toml file at that path. Raises ValueError, with the nearest name."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"there is no recipe file {name}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    elif name in recipe_names():
        text = (resources.files("overnight") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"there is no recipe {name}{nearest(name, recipe_names())}")
    recipe = from_toml(Recipe, text, name)
    return (
        recipe if recipe.run_name else dataclasses.replace(recipe, run_name=path.name.removesuffix(".toml"))
    )


# ---------------------------------------------------------------- a recipe as the options that `overnight train` takes


def changed_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[str]:
    """The words that make `recipe` of `original`, but for the settings in `left_out`."""
    return [word for option in list_options(recipe, original, left_out) for word in option]


def list_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[list[str]]:
    """The same, option by option."""
    now, before = flatten(recipe), flatten(original)
    changed = [name for name in now if name not in left_out and now[name] != before[name]]
    if {"total_tokens", "total_steps"} <= {*changed}:  # to give one is to take the other back
        changed.remove("total_steps" if now["total_steps"] is None else "total_tokens")
    sections = flat_names(Recipe)
    kinds = {
        name: field_types(type(getattr(recipe, part)) if part else Recipe) for name, part in sections.items()
    }
    return [as_option(name, now[name], kinds[name][name]) for name in changed]


def as_option(name: str, value: Any, kind: Any) -> list[str]:
    """One setting of the type `kind` as words of a command line."""
    option = f"--{name.replace('_', '-')}"
    if kind is bool:
        assert value, f"there is no option that takes {option} back"
        return [option]
    if isinstance(value, tuple):
        return [option, *map(_as_word, value)]
    return [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]


def _as_word(value: Any) -> str:
    """An item of a list: a record is its values, with `=` between them."""
    return "=".join(map(str, vars(value).values())) if dataclasses.is_dataclass(value) else str(value)


def read_recipe_of(run: Path) -> Recipe:
    """The complete recipe of a run. Raises ValueError if it is not whole."""
    directory = RunDirectory(run)
    return from_toml(Recipe, directory.read_recipe(), str(directory.recipe))
