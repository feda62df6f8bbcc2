"""The command `overnight train`: a new run from a recipe, or a run that goes on."""

from __future__ import annotations

from pathlib import Path

from overnight.run_directory import RunDirectory
from overnight.settings import from_toml
from overnight.stages.recipe import Recipe
from overnight.terminal import say


def load_resumed(run: Path) -> Recipe:
    """The complete recipe of a run that is to go on."""
    recipe = RunDirectory(run).recipe
    return from_toml(Recipe, recipe.read_text(encoding="utf-8"), str(recipe))


def run(recipe: Recipe, resumed: Path | None) -> None:
    """Train `recipe` in runs/<run_name>, or go on in `resumed`."""
    from overnight.stages import pretrain

    directory = RunDirectory(resumed or Path("runs") / recipe.run_name)
    pretrain.run(recipe, directory, resume=resumed is not None)
    last = directory.read_metrics()[-1]
    done = f"{last['step']} steps, {last['tokens']:,} tokens"
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    say(f"trained {directory.path} for {done}; last loss {loss}")
    say(f"next: overnight report {directory.path}")
