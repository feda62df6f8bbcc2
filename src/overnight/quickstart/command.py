"""Everything on a laptop, offline, in a few minutes: text, tokenizer, training, evaluation, report."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import textwrap
from pathlib import Path
from typing import Any

from overnight.data.dataset import open_one_dataset
from overnight.evaluation.compressors import compressed_bits_per_byte
from overnight.preparation.prepare import ensure_prepared
from overnight.quickstart import QuickstartConfig
from overnight.recipe import Recipe, flatten, load_recipe, read_recipe_of
from overnight.report.page import write_report
from overnight.report.plots import check_matplotlib
from overnight.run.resume import load_resumed
from overnight.run.train import train
from overnight.run_directory import RunDirectory, write_atomically
from overnight.terminal import echo, progress

RUN = Path("runs/quickstart")


def run(config: QuickstartConfig) -> None:
    """Prepare, train, evaluate, sample, report; what is there already is reused."""
    check_matplotlib()  # the report comes last: minutes from here
    directory = RunDirectory(RUN)
    if config.fresh and directory.path.exists():
        with directory.locked():
            shutil.rmtree(directory.path)
    recipe = load_recipe("quickstart")
    _train(recipe, directory)
    rivals = _compress(recipe, directory)
    page = write_report(directory.path)
    _say_results(directory, rivals, page)


def _train(recipe: Recipe, directory: RunDirectory) -> None:
    """Train all of the run, or what is missing of it, or nothing."""
    if not directory.exists():
        train(recipe, directory)
        return
    before = read_recipe_of(directory.path)
    then = flatten(before) | {"data": recipe.data.data}  # a run names the folder its source was prepared into
    changed = [name for name, value in flatten(recipe).items() if value not in {None, then[name]}]
    if changed:
        raise ValueError(
            f"{directory.path} belongs to another recipe, which differs in {', '.join(changed)}: "
            "keep it under another name, or start over with `overnight quickstart --fresh`"
        )
    done, total = len(directory.read_metrics()), before.schedule.total_steps or 0
    if directory.is_finished(total):
        echo(f"reusing {directory.path}, trained for all of its {total} steps; --fresh starts over")
        return
    echo(f"going on with {directory.path}, which has done {done} of its {total} steps; --fresh starts over")
    train(load_resumed(directory.path), directory, resume=True)


def _compress(recipe: Recipe, directory: RunDirectory) -> dict[str, float]:
    """Bits per byte of the validation text under its rivals; measured once, kept in compression.json."""
    kept = directory.path / "compression.json"
    if not kept.is_file():
        dataset = open_one_dataset(ensure_prepared(recipe.data))
        held_out = dataset.text("validation")
        with progress("compress", 1, "validation split") as advance:
            measured = compressed_bits_per_byte(held_out, dataset.text("train"))
            advance()
        content = {"bytes": len(held_out), "bits_per_byte": measured}
        write_atomically(kept, json.dumps(content, indent=2) + "\n")
    found: dict[str, float] = json.loads(kept.read_text())["bits_per_byte"]
    return found


def _say_results(directory: RunDirectory, rivals: dict[str, float], page: Path) -> None:
    metrics = directory.read_metrics()
    told: dict[str, Any] = directory.read_events("evaluations")[-1]
    evaluation = {name: math.nan if value is None else value for name, value in told.items()}
    sample: dict[str, Any] = directory.read_events("samples")[-1]
    speed = statistics.median(line["tokens_per_second"] for line in metrics)
    wide = max(len(name) for name in rivals)
    echo()
    loss = f"{evaluation['loss']:.4f} nats per token, perplexity {evaluation['perplexity']:.1f}"
    echo(f"validation loss   {loss}")
    echo("bits per byte     of the same validation text, lower is better:")
    for name, value in sorted(
        {**rivals, "this GPT-2": evaluation["bits_per_byte"]}.items(), key=lambda x: -x[1]
    ):
        echo(f"                  {name:<{wide}}  {value:.3f}{'  <-' if name == 'this GPT-2' else ''}")
    echo(f"speed             {speed:,.0f} tokens per second (median)")
    echo("a sample          " + repr(sample["prompt"]))
    text = textwrap.wrap(sample["prompt"] + sample["completion"], 60, replace_whitespace=True)
    for line in text[:6]:
        echo("                  " + line)
    echo(f"report            {page}")
    echo()
    echo(f'next: overnight generate {directory.path} "The value of"')
