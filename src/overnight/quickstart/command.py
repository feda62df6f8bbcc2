"""The command `overnight quickstart`: text, tokenizer, training, evaluation, report, offline in minutes."""

from __future__ import annotations

import math
import shutil
import statistics
import textwrap
from pathlib import Path

from overnight.evaluation.compressors import measure_compression
from overnight.quickstart import QuickstartConfig
from overnight.recipe import Recipe, flatten, load_recipe, read_recipe_of
from overnight.report.page import write_report
from overnight.report.plots import check_matplotlib
from overnight.run.resume import load_resumed
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.terminal import echo, shell_command

RUN = Path("runs/quickstart")


def run(config: QuickstartConfig) -> None:
    """Prepare, train, evaluate, sample, report; reuses existing results."""
    check_matplotlib()  # before minutes of training
    directory = RunDirectory(RUN)
    if config.fresh and directory.path.exists():
        with directory.locked():
            shutil.rmtree(directory.path)
    recipe = load_recipe("quickstart")
    _train(recipe, directory)
    compressors = measure_compression(directory, whole=True).get("bits_per_byte", {})
    page = write_report(directory.path)
    _print_results(directory, compressors, page)


def _train(recipe: Recipe, directory: RunDirectory) -> None:
    """Train the run, or resume it, or reuse it if it is finished."""
    if not directory.exists():
        train_recipe(recipe, directory)
        return
    # A run names the folder that its source was prepared into, so `data` always differs.
    before = flatten(read_recipe_of(directory.path)) | {"data": recipe.data.data}
    changed = [name for name, value in flatten(recipe).items() if value not in {None, before[name]}]
    if changed:
        raise ValueError(
            f"{directory.path} belongs to another recipe, which differs in {', '.join(changed)}: "
            "rename it, or start over with `overnight quickstart --fresh`"
        )
    status = describe_run(directory.path)
    if status.state == "finished":
        echo(f"reusing {directory.path}, which has finished its {status.step} steps; --fresh starts over")
        return
    progress_so_far = f"{status.step} of {status.total_steps} steps"
    echo(f"resuming {directory.path}, after {progress_so_far}; --fresh starts over")
    train_recipe(load_resumed(directory.path), directory, resume=True)


def _print_results(directory: RunDirectory, compressors: dict[str, float], page: Path) -> None:
    last = directory.read_events("evaluations")[-1]
    loss, perplexity, bits = (
        math.nan if last[name] is None else last[name] for name in ("loss", "perplexity", "bits_per_byte")
    )
    sample = directory.read_events("samples")[-1]
    speed = statistics.median(line["tokens_per_second"] for line in directory.read_metrics())
    text = textwrap.wrap(sample["prompt"] + sample["completion"], 60, replace_whitespace=True)
    ranked = sorted((compressors | {"this model": bits}).items(), key=lambda item: -item[1])
    width = max(len(name) for name, _ in ranked)
    echo()
    echo(f"validation loss   {loss:.4f} nats per token, perplexity {perplexity:.1f}")
    echo("bits per byte     of the same validation text, lower is better:")
    for name, value in ranked:
        echo(f"                  {name:<{width}}  {value:.3f}{'  <-' if name == 'this model' else ''}")
    echo(f"speed             {speed:,.0f} tokens per second (median)")
    echo(f"a sample          {sample['prompt']!r}")
    for line in text[:6]:
        echo(f"                  {line}")
    echo(f"report            {page}")
    echo()
    echo(f'next: {shell_command("generate", directory.path)} "The value of"')
