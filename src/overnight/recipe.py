"""A training recipe: `Recipe` is what a user asks for, `Resolved` what was decided for one machine."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from overnight.config import (
    flat_names,
    flat_types,
    folders_of_paths,
    from_toml,
    nearest,
    parse_duration,
    path_from,
)
from overnight.data import DataConfig
from overnight.model.model_config import ModelConfig
from overnight.options import as_option
from overnight.renamed import RENAMED_SETTINGS, Renamed
from overnight.run_directory import RunDirectory
from overnight.trackers import find_problems
from overnight.training import Compute, ComputeConfig, OptimizerConfig
from overnight.training.batch import BatchConfig, BatchPlan
from overnight.training.guard import GuardConfig
from overnight.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the model is evaluated on held-out text."""

    evaluate_every_steps: int | None = 250
    """Steps between evaluations; one more before the first step, and one after the last."""
    evaluation_tokens: int | None = None
    """Number of validation tokens, always the same ones; all of them if left out."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate as well: hellaswag, lambada, ...; `overnight evaluate --help` lists all."""
    tasks_every_steps: int | None = None
    """Steps between evaluations of the tasks, and after the last; with each evaluation if left out."""
    task_examples: int | None = None
    """Number of examples of each task (of a text, thousands of characters), from its start; all if left
    out."""
    task_files: str | None = None
    """A folder with the tasks' official files; downloaded once if left out."""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """When the run generates text samples."""

    sample_every_steps: int | None = None
    """Steps between samples, and after the last; off if left out."""
    sample_prompts: tuple[str, ...] = ("",)
    """Prompts to continue; an empty one begins a document."""
    sample_tokens: int = 64
    """Length of a sample."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """When checkpoints are saved. The last step, and an interrupted run, are always saved."""

    checkpoint_every_steps: int | None = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int | None = 2
    """Number of newest checkpoints to keep; all if left out."""
    keep_every_steps: int | None = None
    """Also keep one checkpoint every this many steps."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss."""
    async_checkpoint: bool = True
    """Write checkpoints in a thread, from a copy in host memory, while training continues; else wait."""
    max_time: str | None = None
    """Save and stop after the step at which the command has run for this time: 7h50m, 90m, 1d12h."""

    def count_kept(self, steps: int) -> int:
        """The largest number of checkpoints that a finished run of `steps` steps has, the last included."""
        saved = -(-steps // self.checkpoint_every_steps) if self.checkpoint_every_steps else 1
        if self.keep_checkpoints is None:
            return saved
        besides = steps // self.keep_every_steps if self.keep_every_steps else 0
        return min(saved, self.keep_checkpoints + besides + self.keep_best)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that decide a training run."""

    run_name: str = ""
    """The run's folder under runs/, or GROUP/NAME; the recipe's own name if left out."""
    seed: int = 1337
    """Seed of the weights, the order of the data, dropout and samples."""
    init_from: str | None = None
    """Start from this model's weights: a run, a checkpoint, a Hugging Face folder or name."""
    trackers: tuple[str, ...] = ()
    """Also send the metrics to these: tensorboard, wandb, trackio."""
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

    RENAMED: ClassVar[Renamed] = RENAMED_SETTINGS
    """Former names of settings and values, in recipes, runs and on the command line."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = self.data.problems() + self.model.problems() + self.optimizer.problems()
        found += self.optimizer.misfits(self.model, self.compute) + find_problems(self.trackers)
        found += self.schedule.problems() + self.batch.problems() + self.guard.problems()
        if self.guard.spike_sigma is not None and self.compute.precision == "fp16":
            found.append("spike_sigma can't be used with precision=fp16, where the scaler decides: use bf16")
        if self.compute.deterministic_reduce and self.batch.micro_batch_size is None:
            found.append(
                "deterministic_reduce=True needs micro_batch_size: what memory holds depends on the number "
                "of processes, and rounding depends on the micro-batches"
            )
        try:
            parse_duration(self.checkpoints.max_time or "0s")
        except ValueError as error:
            found.append(f"max_time: {error}")
        if not re.fullmatch(r"(?!\.)[^/]+(/(?!\.)[^/]+)?", self.run_name, re.DOTALL):
            found.append(f"run_name={self.run_name!r} must be a folder name, or GROUP/NAME")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} must be at least 0 and less than 2^63")
        for name, value in flatten(self).items():
            if isinstance(value, int) and value >= 2**63 and name != "seed":
                found.append(f"{name}={value} must be less than 2^63")
            is_count = name.endswith("_every_steps") or name in AT_LEAST_ONE
            if is_count and isinstance(value, int) and value < 1:
                found.append(f"{name}={value} must be at least 1, or left out")
        return found


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A recipe with everything decided for one model, dataset and machine."""

    recipe: Recipe
    """The complete recipe, as the run records it."""
    model: ModelConfig
    """The model's sizes, with the tokenizer's vocabulary."""
    compute: Compute
    plan: BatchPlan
    total_steps: int


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
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
"""Settings that may change when a run is resumed: its length, its machine, and what it writes."""


def flatten(recipe: Recipe) -> dict[str, object]:
    """Every setting by its flat name."""
    sections = flat_names(Recipe)
    return {
        name: getattr(getattr(recipe, section) if section else recipe, name)
        for name, section in sections.items()
    }


def with_settings(recipe: AnyRecipe, **settings: Any) -> AnyRecipe:
    """`recipe` with these settings, by their flat names. Raises ValueError for an unknown name.

    total_steps and total_tokens replace each other.
    """
    sections = flat_names(Recipe)
    for name, value in Recipe.RENAMED.settings(settings).items():
        if name not in sections:
            raise ValueError(f"{name} is not a setting of a recipe{nearest(name, sections)}")
        given = str(value) if isinstance(value, Path) else value
        changes: dict[str, Any] = {name: tuple(given) if isinstance(given, list) else given}
        if name in ("total_steps", "total_tokens"):
            changes = {"total_steps": None, "total_tokens": None, **changes}
        if section := sections[name]:
            changes = {section: dataclasses.replace(getattr(recipe, section), **changes)}
        recipe = dataclasses.replace(recipe, **changes)
    return recipe


def plain_recipe(config: Recipe) -> Recipe:
    """The recipe of a command's config, without the command's own options."""
    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def list_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[list[str]]:
    """The options that turn `original` into `recipe`, each as words, without the settings in `left_out`."""
    now, before, kinds = flatten(recipe), flatten(original), flat_types(Recipe)
    changed = [name for name in now if name not in left_out and now[name] != before[name]]
    if {"total_tokens", "total_steps"} <= {*changed}:  # either option replaces the other
        changed.remove("total_steps" if now["total_steps"] is None else "total_tokens")
    return [as_option(name, now[name], kinds[name]) for name in changed]


def changed_options(recipe: Recipe, original: Recipe, left_out: Set[str] = frozenset()) -> list[str]:
    """The words of `list_options`, one after the other."""
    return [*chain(*list_options(recipe, original, left_out))]


def frozen_settings(recipe: Recipe) -> dict[str, object]:
    """Settings that may not change during a run, as JSON values; settings that are paths are left out."""
    # Data and models may move to another path; a resumed run compares their content, and weights, instead.
    may_differ = RESUME_MUTABLE | {"run_name", "init_from", "data", "mixture"}
    frozen = {name: value for name, value in flatten(recipe).items() if name not in may_differ}
    return dict(json.loads(json.dumps(frozen, default=dataclasses.asdict)))


def incompatible_settings(now: Mapping[str, object], before: Mapping[str, object]) -> list[str]:
    """Settings that differ although a resumed run may not change them, as "name=now (was before)"."""
    return [
        f"{name}={now[name]} (was {before[name]})"
        for name in now
        if name not in RESUME_MUTABLE and name in before and now[name] != before[name]
    ]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("overnight") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def describe_recipes() -> dict[str, str]:
    """What each recipe trains, from the beginning of its first comment."""
    folder = resources.files("overnight") / "recipes"
    texts = {name: (folder / f"{name}.toml").read_text(encoding="utf-8") for name in recipe_names()}
    comments = {name: " ".join(re.findall(r"^# ?(.*)", text, re.MULTILINE)) for name, text in texts.items()}
    return {name: re.split(r"[:;(.]\s|, with|\s\(", comment)[0] for name, comment in comments.items()}


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or the .toml file at that path. Raises ValueError, with the nearest name."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ValueError(f"{name}: no such recipe file")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    elif name in recipe_names():
        text = (resources.files("overnight") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"there is no recipe {name}{nearest(name, recipe_names())}")
    recipe = from_toml(Recipe, text, name)
    if path.name == RunDirectory(path.parent).recipe.name:  # a run's
        recipe = _with_paths_of(RunDirectory(path.parent), recipe)
    return with_settings(recipe, run_name=recipe.run_name or path.name.removesuffix(".toml"))


def read_recipe_of(run: Path) -> Recipe:
    """The complete recipe of a run, its paths as seen from here. Raises ValueError if its file is damaged."""
    directory = RunDirectory(run)
    recipe = from_toml(Recipe, directory.read_recipe(), str(directory.recipe))
    return _with_paths_of(directory, recipe)


def _with_paths_of(directory: RunDirectory, recipe: Recipe) -> Recipe:
    """`recipe` with the relative paths of a run, which are those of the folder it was begun or resumed in."""
    folders, mixture = folders_of_paths(directory.environment), recipe.data.mixture
    return with_settings(
        recipe,
        data=path_from(folders, recipe.data.data),
        mixture=[dataclasses.replace(part, path=path_from(folders, part.path)) for part in mixture],
        init_from=path_from(folders, recipe.init_from, may_be_name=True),
        task_files=path_from(folders, recipe.evaluation.task_files),
    )
