"""The arms of a comparison: recipes that differ in what is compared and in nothing else. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from overnight.ablation import AblationConfig
from overnight.config import flat_names, flat_types, nearest, raise_problems
from overnight.data import DataConfig
from overnight.model.parts import MODEL_SWITCHES, SIZES
from overnight.options import from_arguments
from overnight.recipe import Recipe, flatten, plain_recipe, with_settings
from overnight.terminal import echo
from overnight.training import OptimizerConfig
from overnight.training.batch import BatchConfig

R = TypeVar("R", bound=Recipe)
CONTROL = "control"
SWITCHES = MODEL_SWITCHES | {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}
"""The settings that can be left out, and their defaults, which are GPT-2's."""
SHARED = (
    *(field.name for field in dataclasses.fields(DataConfig) if field.name != "cache_bytes"),
    *(field.name for field in dataclasses.fields(BatchConfig) if field.name != "micro_batch_size"),
    *("total_steps", "total_tokens", "context_length", "vocab_size", "evaluation_tokens", "init_from"),
    *("device", "precision"),
)
"""Settings that decide text, tokens and evaluation: equal in all arms."""
SET_BY_CAMPAIGN = {"keep_checkpoints": 1, "keep_every_steps": None, "keep_best": False}
"""Of a finished run only its last checkpoint is needed."""
NOT_COMPARED = frozenset({*SET_BY_CAMPAIGN, "run_name", "seed"})
LONGEST_NAME = 150  # of an arm: its runs' folders have a seed and tuned settings besides, within 255 bytes


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the compared recipes; its runs differ only in the seed."""

    name: str
    """A folder's name, and unique."""
    recipe: Recipe
    grid: tuple[Mapping[str, Any], ...] = ()
    """The settings among which the best are chosen before it is compared; () if nothing is tuned."""

    def changes_from(self, baseline: Arm) -> dict[str, tuple[object, object]]:
        """The settings that differ: the baseline's value and this arm's."""
        mine, theirs = flatten(self.recipe), flatten(baseline.recipe)
        return {
            name: (theirs[name], mine[name])
            for name in mine
            if name not in NOT_COMPARED and mine[name] != theirs[name]
        }


def build_arms(config: AblationConfig, name: str, baseline: Recipe | None) -> list[Arm]:
    """The arms, the baseline first. Raises one ValueError with all that is wrong, before any training.

    `config` is the recipe `name`, `baseline` that of `config.baseline`, both with the command's options.
    """
    problems: list[str] = []
    recipe = _as_arm(config)
    arms = [Arm(name=arm_name(name), recipe=recipe)]
    others: Iterator[Arm] = itertools.chain(
        _left_out(config.leave_out, recipe, problems), _added(config.add, recipe, problems)
    )
    if baseline is not None:
        if config.leave_out or config.add:
            problems.append("--baseline can't be used with --leave-out or --add, whose baseline is RECIPE")
        arms.insert(0, Arm(name=arm_name(config.baseline or ""), recipe=_as_arm(baseline)))
    arms += [arm for arm in others if baseline is None]
    if config.control:
        arms.append(Arm(name=CONTROL, recipe=arms[0].recipe))
    if len(arms) == 1 and not problems:
        problems.append(
            "there is nothing to compare with: give --baseline RECIPE, --leave-out SETTING, "
            "--add SETTING=VALUE or --control"
        )
    if "/" in config.run_name:
        problems.append(f"run_name={config.run_name} must be a folder name: its runs are in a folder of it")
    problems += _seed_problems(config)
    problems += _problems_of_arms(arms)
    arms = [dataclasses.replace(arm, grid=tuple(grid)) for arm, grid in _grids(config.tune, arms, problems)]
    raise_problems(list(dict.fromkeys(problems)), f"ablation of {name}")
    return arms


def arm_name(recipe: str) -> str:
    """The name of a recipe's arm: the file's, without its folder."""
    return _safe(recipe.rpartition("/")[2].removesuffix(".toml"))


def read_seeds(config: AblationConfig) -> tuple[int, ...]:
    """The seeds of `config.seeds`. Raises ValueError."""
    try:
        numbers = [int(word) for word in config.seeds.replace(" ", "").split(",")]
    except ValueError:
        raise ValueError(f"seeds={config.seeds} must be a number, or seeds separated by commas") from None
    if len(numbers) > 1:
        return tuple(numbers)
    if not 1 <= numbers[0] <= 1000:
        raise ValueError(f"seeds={config.seeds} must be at least 1 and at most 1000")
    return tuple(range(config.seed, config.seed + numbers[0]))


def tuning_seed(seeds: Sequence[int]) -> int:
    """The seed with which rates are tuned: none of the compared ones."""
    return min(seeds) - 1 if min(seeds) else max(seeds) + 1


def _seed_problems(config: AblationConfig) -> Iterator[str]:
    try:
        seeds = read_seeds(config)
    except ValueError as error:
        yield str(error)
        return
    for seed in sorted({*seeds}):
        if seeds.count(seed) > 1:
            yield f"seeds={config.seeds} names the seed {seed} twice: its runs would be the same"
    if outside := [seed for seed in seeds if not 0 <= seed < 2**63 - 1]:
        yield f"the seed {outside[0]} must be at least 0 and less than 2^63 - 1"


def keep_schedule(recipe: R, whole: Recipe) -> R:
    """`recipe`, which is `whole` with options, with the shape of its schedule kept if its length is another.

    Warm-up and decay are scaled with the length, unless they were given, too: 715 steps of warm-up are right
    for 19,073 steps, and more than a short comparison has.
    """
    before, now = _length(whole), _length(recipe)
    changes = {}
    for name in ("warmup_steps", "decay_steps"):
        steps: Any = flatten(whole)[name]
        if steps and flatten(recipe)[name] == steps and now != before:
            changes[name] = max(1, round(steps * now / before))
            echo(f"{whole.run_name}: {name}={steps} becomes {changes[name]}, with the length")
    return with_settings(recipe, **changes)


def _length(recipe: Recipe) -> float:
    """In tokens."""
    schedule, batch = recipe.schedule, recipe.batch
    return float(schedule.total_tokens or (schedule.total_steps or 0) * batch.tokens_per_step)


def _as_arm(recipe: Recipe) -> Recipe:
    return with_settings(plain_recipe(recipe), **SET_BY_CAMPAIGN)


def _setting(name: str) -> str:
    """The name of a setting that is written as an option, or as in a recipe."""
    return name.strip().removeprefix("--").replace("-", "_")


def _safe(text: str) -> str:
    """`text` as a part of a folder's name; a long one is cut, and ends with its digest."""
    name = re.sub(r"[^\w.=-]+", "-", text).strip("-.") or "arm"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def _left_out(words: Sequence[str], recipe: Recipe, problems: list[str]) -> Iterator[Arm]:
    """An arm for each word between commas, with GPT-2's values for its settings."""
    now = flatten(recipe)
    changed = [name for name, default in SWITCHES.items() if now[name] != default]
    for word in filter(None, ",".join(words).split(",")):
        names = [*dict.fromkeys(map(_setting, word.split("+")))]
        before = len(problems)
        for name in names:
            if name not in SWITCHES:
                what = "is a size" if name in SIZES else "is not a setting of the model or the optimizer"
                problems.append(f"--leave-out {name}: it {what}{_choices(name, changed)}")
            elif name not in changed:
                what = "already has GPT-2's value in this recipe"
                problems.append(f"--leave-out {name}: it {what}{_choices(name, changed)}")
        if len(problems) == before:
            defaults = {name: SWITCHES[name] for name in names}
            arm = Arm(name=_safe(f"without-{'-'.join(names)}"), recipe=with_settings(recipe, **defaults))
            if {*arm.recipe.problems()} - {*recipe.problems()}:
                problems.append(
                    f"--leave-out {word}: leave out together, joined by +, what cannot stand alone"
                )
            yield arm


def _choices(name: str, changed: Sequence[str]) -> str:
    """What can be left out instead."""
    if not changed:
        return "; the recipe has GPT-2's values for all of them, so nothing can be left out"
    near = difflib.get_close_matches(name, changed, n=1)
    return f"; did you mean {near[0]}?" if near else f"; this recipe changes {', '.join(changed)}"


def _added(words: Sequence[str], recipe: Recipe, problems: list[str]) -> Iterator[Arm]:
    """An arm for each SETTING=VALUE; several joined by + are one arm."""
    for word in itertools.chain.from_iterable(word.split(",") for word in words):
        pairs = [each.partition("=") for each in re.split(r"\+(?=[a-zA-Z_-][\w-]*(?:=|$|\+))", word)]
        try:
            settings = {
                _setting(name): _read_value(name, equals, value, recipe) for name, equals, value in pairs
            }
            if len(settings) < len(pairs):
                raise ValueError("give each setting once")
            if own := NOT_COMPARED & settings.keys():
                raise ValueError(f"`overnight ablate` sets {', '.join(sorted(own))} for its runs")
        except ValueError as error:
            problems.append(f"--add {word}: {error}")
            continue
        changed = with_settings(recipe, **settings)
        title = "-".join(f"{_setting(name)}={value}" for name, _, value in pairs)
        yield Arm(name=_safe(re.sub("=true(?=-|$)", "", title, flags=re.IGNORECASE)), recipe=changed)


def _read_value(name: str, equals: str, value: str, recipe: Recipe) -> Any:
    """A setting's value of a text, as its option reads it. Raises ValueError."""
    setting, known = _setting(name), flat_names(Recipe)
    if not setting:
        raise ValueError("give SETTING=VALUE")
    if setting not in known:
        raise ValueError(f"{name} is not a setting of a recipe{nearest(setting, known)}")
    if not equals or not value.strip():
        raise ValueError(f"give its value, as in {setting}={_shown(flatten(recipe)[setting])}")
    word = value.strip()
    if flat_types(Recipe)[setting] is bool:
        if word.lower() not in {"true", "false"}:
            raise ValueError(f"{setting}={word} must be true or false")
        return word.lower() == "true"
    read = from_arguments(Recipe, [f"--{setting}={word}"], prog="overnight ablate", about="", default=recipe)
    return flatten(read)[setting]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "off" if value is None else str(value)


def _problems_of_arms(arms: Sequence[Arm]) -> Iterator[str]:
    """What is wrong with one of the recipes, or with comparing them."""
    first, *others = arms
    of_first = first.recipe.problems()
    yield from of_first
    for arm in others:
        yield from (f"{arm.name}: {problem}" for problem in arm.recipe.problems() if problem not in of_first)
    if first.recipe.checkpoints.max_time is not None:
        yield "max_time would end some runs early: leave it out, and stop the command with Ctrl-C instead"
    silent = [arm.name for arm in arms if arm.recipe.evaluation.evaluate_every_steps is None]
    if silent:
        yield (
            f"evaluate_every_steps is off in {', '.join(silent)}, and arms are compared by their last "
            "evaluation: give --evaluate-every-steps"
        )
    yield from _unequal(arms)
    for one, other in itertools.combinations(arms, 2):
        if one.name == other.name:
            yield (
                f"two arms are called {one.name}: give each once, or rename one of the files; --control "
                "compares an arm with itself"
            )
        elif other.name != CONTROL and not other.changes_from(one):
            yield (
                f"{other.name} is the same recipe as {one.name}: leave it out, or give --control to compare "
                "an arm with itself"
            )


def _unequal(arms: Sequence[Arm]) -> Iterator[str]:
    first, *others = arms
    for arm in others:
        changes = {name: pair for name, pair in arm.changes_from(first).items() if name in SHARED}
        if changes:
            listed = ", ".join(
                f"{name} ({_shown(old)} and {_shown(new)})" for name, (old, new) in changes.items()
            )
            yield (
                f"{first.name} and {arm.name} differ in {listed}: arms need equal text, tokens and "
                f"evaluation; an option, as --{next(iter(changes)).replace('_', '-')}, holds for all arms"
            )


def _grids(
    words: Sequence[str], arms: Sequence[Arm], problems: list[str]
) -> Iterator[tuple[Arm, list[dict[str, Any]]]]:
    """Each arm with the combinations of the values to try that have a meaning for it."""
    recipe = arms[0].recipe
    tried = dict(_read_tuned(words, recipe, problems))
    used: set[str] = set()
    for arm in arms:
        fitting = [name for name, values in tried.items() if _can_have(arm, name, values)]
        used |= {*fitting}
        combinations = itertools.product(*(tried[name] for name in fitting))
        grid = [dict(zip(fitting, each, strict=True)) for each in combinations]
        for combination in grid:
            found = with_settings(arm.recipe, **combination).problems()
            problems += [f"--tune: {arm.name}: {one}" for one in found if one not in arm.recipe.problems()]
        yield arm, grid if fitting else []
    for name in tried.keys() - used:
        found = with_settings(recipe, **{name: tried[name][0]}).problems()
        problems += [f"--tune {name}: no arm can have it: {one}" for one in found]


def _can_have(arm: Arm, name: str, values: Sequence[object]) -> bool:
    """True if a setting has a meaning for the arm: some value of it causes no problem."""
    known = {*arm.recipe.problems()}
    return any(known.issuperset(with_settings(arm.recipe, **{name: value}).problems()) for value in values)


def _read_tuned(words: Sequence[str], recipe: Recipe, problems: list[str]) -> Iterator[tuple[str, list[Any]]]:
    names = [_setting(word.partition("=")[0]) for word in words]
    for setting, word in zip(names, words, strict=True):
        _, equals, text = word.partition("=")
        values = [each for each in text.split(",") if each.strip()]
        two_or_more = f"give two or more values, as in {setting}=0.01,0.02"
        try:
            if setting in SHARED or setting in NOT_COMPARED:
                raise ValueError("it must be equal in all runs")
            if names.count(setting) > 1:
                raise ValueError("give all values of a setting in one --tune")
            if len(values) < 2 and setting in flat_names(Recipe):
                raise ValueError(two_or_more)
            tried = [*dict.fromkeys(_read_value(setting, equals, each, recipe) for each in values or [""])]
            if len(tried) < 2:
                raise ValueError(two_or_more)
        except ValueError as error:
            problems.append(f"--tune {word}: {error}")
        else:
            yield setting, tried
