"""Everything on a laptop, offline, in a few minutes: text, tokenizer, training, evaluation, report."""

from __future__ import annotations

import json
import shutil
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.run_directory import RunDirectory, write_atomically
from overnight.terminal import progress, say

if TYPE_CHECKING:  # --help is shown without torch
    from overnight.stages.materials import Materials
    from overnight.stages.recipe import Recipe

RUN = Path("runs/quickstart")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The main job, small: it trains a GPT-2 on the Python documentation that comes with Python."""

    fresh: bool = False
    """Start over, even if there is a quickstart run already."""


def run(config: QuickstartConfig) -> None:
    """Prepare, train, evaluate, sample, report; what is there already is reused."""
    from overnight.report.page import write_report
    from overnight.stages.materials import open_materials

    directory = RunDirectory(RUN)
    if config.fresh and directory.path.exists():
        with directory.locked():
            shutil.rmtree(directory.path)
    recipe = _trained(directory)
    materials = open_materials(recipe.data)
    rivals = _compression(directory, materials)
    page = write_report(directory.path)
    _say_results(directory, rivals, page)


def _trained(directory: RunDirectory) -> Recipe:
    """The recipe of the finished quickstart run, training what is missing of it."""
    from overnight.settings import from_toml
    from overnight.stages.pretrain import run as train
    from overnight.stages.recipe import Recipe, load_recipe

    if not directory.exists():
        return train(load_recipe("quickstart"), directory)
    recipe = from_toml(Recipe, directory.recipe.read_text(encoding="utf-8"), str(directory.recipe))
    steps = len(directory.read_metrics())
    if steps == recipe.schedule.total_steps:
        say(f"reusing {directory.path}, trained for all of its {steps} steps; --fresh starts over")
        return recipe
    say(f"reusing {directory.path}, which was stopped; --fresh starts over")
    return train(recipe, directory, resume=True)


def _compression(directory: RunDirectory, materials: Materials) -> dict[str, float]:
    """Bits per byte of the validation text under its rivals; measured once, kept in compression.json."""
    from overnight.evaluation.compressors import compressed_bits_per_byte

    kept = directory.path / "compression.json"
    if not kept.is_file():
        text = {split: materials.text(split) for split in ("train", "validation")}
        with progress("compress", 1, "rivals") as advance:
            measured = compressed_bits_per_byte(text["validation"], text["train"])
            advance()
        content = {"bytes": len(text["validation"]), "bits_per_byte": measured}
        write_atomically(kept, json.dumps(content, indent=2) + "\n")
    found: dict[str, float] = json.loads(kept.read_text())["bits_per_byte"]
    return found


def _say_results(directory: RunDirectory, rivals: dict[str, float], page: Path) -> None:
    metrics = directory.read_metrics()
    evaluation: dict[str, Any] = directory.read_events("evaluations")[-1]
    sample: dict[str, Any] = directory.read_events("samples")[-1]
    speed = statistics.median(line["tokens_per_second"] for line in metrics)
    wide = max(len(name) for name in rivals)
    say()
    loss = f"{evaluation['loss']:.4f} nats per token, perplexity {evaluation['perplexity']:.1f}"
    say(f"validation loss   {loss}")
    say("bits per byte     of the same validation text, lower is better:")
    for name, value in sorted(
        {**rivals, "this GPT-2": evaluation["bits_per_byte"]}.items(), key=lambda x: -x[1]
    ):
        say(f"                  {name:<{wide}}  {value:.3f}{'  <-' if name == 'this GPT-2' else ''}")
    say(f"speed             {speed:,.0f} tokens per second (median)")
    say("a sample          " + repr(sample["prompt"]))
    text = textwrap.wrap(sample["prompt"] + sample["completion"], 60, replace_whitespace=True)
    for line in text[:6]:
        say("                  " + line)
    say(f"report            {page}")
    say()
    say(f'next: overnight generate {directory.path} "The value of"')
