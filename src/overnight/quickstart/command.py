"""The command `overnight quickstart`: text, tokenizer, training, evaluation, report, offline in minutes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import shutil
import statistics
import textwrap
from pathlib import Path
from typing import Any

from overnight.data.dataset import open_one_dataset
from overnight.preparation.prepare import ensure_prepared
from overnight.quickstart import QuickstartConfig
from overnight.recipe import Recipe, flatten, load_recipe, read_recipe_of
from overnight.report.page import write_report
from overnight.report.plots import check_matplotlib
from overnight.run.resume import load_resumed
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.terminal import echo, progress, shell_command

RUN = Path("runs/quickstart")
XZ_WINDOW_BYTES = 1 << 30  # the whole training text stays in the window


def run(config: QuickstartConfig) -> None:
    """Prepare, train, evaluate, sample, report; reuses existing results."""
    check_matplotlib()  # before minutes of training
    directory = RunDirectory(RUN)
    if config.fresh and directory.path.exists():
        with directory.locked():
            shutil.rmtree(directory.path)
    recipe = load_recipe("quickstart")
    _train(recipe, directory)
    compressors = _compress(read_recipe_of(directory.path), directory)
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


def _compress(recipe: Recipe, directory: RunDirectory) -> dict[str, float]:
    """Bits per byte of the validation text for each compressor; measured once, kept in compression.json."""
    path = directory.compression
    if not path.is_file():
        dataset = open_one_dataset(ensure_prepared(recipe.data))
        validation_text = dataset.text("validation")
        with progress("compress", 1, "validation split") as advance:
            measured = compressed_bits_per_byte(validation_text, dataset.text("train"))
            advance()
        directory.write(path, {"bytes": len(validation_text), "bits_per_byte": measured})
    bits_per_byte: dict[str, float] = json.loads(path.read_text())["bits_per_byte"]
    return bits_per_byte


def _print_results(directory: RunDirectory, compressors: dict[str, float], page: Path) -> None:
    last = directory.read_events("evaluations")[-1]
    loss, perplexity, bits = (
        math.nan if last[name] is None else last[name] for name in ("loss", "perplexity", "bits_per_byte")
    )
    sample = directory.read_events("samples")[-1]
    speed = statistics.median(line["tokens_per_second"] for line in directory.read_metrics())
    text = textwrap.wrap(sample["prompt"] + sample["completion"], 60, replace_whitespace=True)
    ranked = sorted((compressors | {"this model": bits}).items(), key=lambda item: -item[1])
    width = max(map(len, compressors))
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


# A compressor is a language model that has seen only the text itself. xz that first compresses the training
# text has seen what the model has seen: it is the fair comparison.


def compressed_bits_per_byte(text: bytes, training_text: bytes) -> dict[str, float]:
    """Bits per byte of `text` with gzip, bz2 and xz at their best, and with xz after `training_text`."""
    if not text:
        raise ValueError("the validation split is empty: it has nothing to compress")
    sizes = {
        "gzip": len(gzip.compress(text, 9, mtime=0)),
        "bz2": len(bz2.compress(text, 9)),
        "xz": _xz_bytes(text),
        "xz given the training text": _xz_bytes(training_text + text) - _xz_bytes(training_text),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _xz_bytes(text: bytes) -> int:
    window = min(XZ_WINDOW_BYTES, max(1 << 20, 1 << len(text).bit_length()))
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    ]
    return len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters))
