"""How long a training step of each recipe takes, in turn, on random ids.

    python benchmarks/recipe_steps.py gpt2-124m modern-124m -- --micro-batch-size 2 --tokens-per-step 2048
    python benchmarks/recipe_steps.py quickstart-faithful quickstart

The words after -- are options of `overnight train`, for all recipes. No text is read. A step is one
micro-batch as often as the recipe has it, and the update; recipes whose steps have different numbers of
tokens are compared by token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import measure
from overnight.ablation.timing import time_step_of
from overnight.options import from_arguments
from overnight.planning import PlanConfig
from overnight.planning.command import estimate_plan
from overnight.planning.measure import build_trial
from overnight.recipe import Resolved, load_recipe

HEADINGS = ("recipe", "parameters", "tokens a step", "median ms", "min", "max", "time per token")


def resolve_for_here(name: str, options: Sequence[str]) -> Resolved:
    """A recipe with everything decided for this machine. Raises ValueError as `overnight plan` does."""
    default = PlanConfig(**vars(load_recipe(name)))
    config = from_arguments(PlanConfig, options, prog="recipe_steps.py", about="", default=default)
    return estimate_plan(config, name).resolved


def report(options: argparse.Namespace) -> measure.Report:
    """Times of all recipes."""
    names = [*dict.fromkeys(options.recipes)]
    decided = {name: resolve_for_here(name, options.words) for name in names}
    trials = {name: (resolved, *build_trial(resolved)) for name, resolved in decided.items()}
    sides = {name: partial(time_step_of, *trial) for name, trial in trials.items()}
    found = measure.interleave(sides, options.repeats, warm_ups=2)
    tokens = {name: resolved.recipe.batch.tokens_per_step for name, resolved in decided.items()}
    by_token = {name: [seconds / tokens[name] for seconds in times] for name, times in found.items()}
    compute = decided[names[0]].compute
    return measure.Report(
        title="Steps of recipes, in turn",
        headings=HEADINGS,
        rows=[
            [
                name,
                f"{resolved.model.parameter_count():,}",
                f"{tokens[name]:,}",
                *measure.spread([1e3 * seconds for seconds in found[name]], digits=1),
                f"{measure.paired_ratio(by_token[names[0]], by_token[name]):.2f}",
            ]
            for name, resolved in decided.items()
        ],
        measured={name: [1e3 * seconds for seconds in times] for name, times in found.items()},
        notes=[
            f"On {compute.device} in {compute.precision}, {'' if compute.compile else 'not '}compiled. Time "
            f"per token: the median of the ratios to {names[0]} within each round.",
            *(
                f"{name}: {tokens[name] / statistics.median(found[name]):,.0f} tokens per second"
                for name in names
                if compute.device != "cpu"
            ),
        ],
        settings={"recipes": names, "options": options.words, "repeats": options.repeats},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    end = words.index("--") if "--" in words else len(words)
    parser = measure.command_line(__doc__, repeats=9)
    parser.add_argument("recipes", nargs="+", help="names, or TOML files; the first is the reference")
    options = parser.parse_args(words[:end])
    options.words = [*words[end + 1 :]]
    return options


if __name__ == "__main__":
    measure.run_program(read_options, report)
