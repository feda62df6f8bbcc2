"""The command `overnight bench`: variants of a training step, timed on this machine."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overnight import __version__
from overnight.bench import BenchConfig
from overnight.bench.decide import (
    BenchPlan,
    about_peak,
    decide_bench,
    estimate_seconds,
    find_peak_flops_or_measure,
)
from overnight.bench.table import (
    BenchRecord,
    VariantRecord,
    bench_markdown,
    bench_svg,
    bench_text,
    bench_to_json,
)
from overnight.bench.variants import VARIANTS, tolerance
from overnight.bench.worker import WARM_UPS, StepTask, TimedSteps, interleave, running_workers
from overnight.data import DataConfig
from overnight.data.dataset import open_one_dataset
from overnight.data.shards import open_tokens
from overnight.distributed.world import open_world
from overnight.files import cache_path, write_atomically
from overnight.hardware import find_device_name
from overnight.preparation.prepare import ensure_prepared
from overnight.preparation.sources import python_texts
from overnight.report.plots import check_matplotlib
from overnight.terminal import duration, echo, shell_command
from overnight.tokenizer.bpe import FILES, is_genuine, read_gpt2

COLUMNS = 80
BUSY_SHARE = 0.5  # load of other programs per processor, above which figures are noisy
CHARACTERS_PER_TOKEN = 6  # an upper bound for English, so that enough text is read

Rounds = Sequence[Mapping[str, TimedSteps]]
"""The results of a group, round by round, by variant."""


def run(config: BenchConfig) -> BenchRecord:
    """Measure, print, write. Raises FloatingPointError at the end if a variant's losses are wrong."""
    if config.out is not None:
        check_matplotlib()  # before minutes of measuring
        if Path(config.out).is_file():
            raise ValueError(f"--out {config.out} is a file; name a folder")
    record = measure_variants(decide_bench(config, open_world(config.device).device))
    echo(bench_text(record, shutil.get_terminal_size().columns))  # 80 where there is no terminal
    if config.json:
        sys.stdout.write(json.dumps(bench_to_json(record), indent=2) + "\n")
    if config.out is not None:
        write(record, Path(config.out))
    echo(f"next: {shell_command('train', config.model)}")
    if record.wrong:
        raise FloatingPointError(
            f"{', '.join(record.wrong)}: the losses differ from float32's by more than rounding explains; "
            "do not train with these settings on this machine"
        )
    return record


def measure_variants(plan: BenchPlan) -> BenchRecord:
    """Time the steps of all variants, interleaved, group after group."""
    ids, origin = read_ids(plan)
    announce(plan, origin)
    results, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ids.npy"
        np.save(file, ids)
        for group in plan.groups:
            tasks = {name: replace(plan.tasks[name], ids=str(file)) for name in group}
            rounds = []
            with running_workers(tasks) as workers:
                for timed in interleave(workers, plan.steps):
                    rounds.append(timed)
                    rates.append(find_peak_flops_or_measure(plan.device, plan.precision))
            results.append(rounds)
    return build_record(plan, results, statistics.median(rates), origin)


def announce(plan: BenchPlan, origin: str) -> None:
    """Print the variants, those that are skipped, and the expected duration."""
    echo(f"{plan.config.model} in training, each variant on top of those before it:")
    width = max(map(len, plan.variants))
    for name, reason in plan.variants.items():
        echo(f"  {name:<{width}}  {f'skipped: {reason}' if reason else VARIANTS[name].about}")
    if len(plan.groups) > 1:
        groups = ", then ".join(f"{group[0]} to {group[-1]}" for group in plan.groups)
        echo(textwrap.fill(f"Memory is enough for one group at a time: {groups}.", COLUMNS))
    echo(f"{plan.rounds} rounds on {origin}, about {duration(estimate_seconds(plan))}.")
    if (load := os.getloadavg()[0]) > BUSY_SHARE * (os.cpu_count() or 1):
        echo(f"The machine is busy (load {load:.1f}): the figures will be noisy.")
    echo()


def build_record(plan: BenchPlan, results: Sequence[Rounds], peak_flops: float, origin: str) -> BenchRecord:
    """The record of all variants, from the rounds of each group; `peak_flops` is the peak in MFU."""
    records = {
        name: VariantRecord(name=name, about=VARIANTS[name].about, skipped=reason)
        for name, reason in plan.variants.items()
    }
    for group, rounds in zip(plan.groups, results, strict=True):
        for before, name in zip([None, *group], group, strict=False):
            if not records[name].milliseconds:  # a group begins with the last variant of the one before
                records[name] = record_variant(plan.tasks[name], name, before, rounds)
    model, rows, tokens = plan.baseline.model, plan.baseline.rows_per_step, plan.baseline.tokens_per_step
    return BenchRecord(
        model=plan.config.model,
        device_name=find_device_name(plan.device),
        tokens_per_step=tokens,
        about_step=f"a step of {rows} x {model.context_length:,} = {tokens:,} tokens",
        flops_per_token=model.flops_per_token(),
        peak_flops=peak_flops,
        about_peak=about_peak(plan.device, plan.precision),
        variants=tuple(records.values()),
        groups=tuple(map(tuple, plan.groups)),
        environment={"text": origin, **describe_software()},
    )


def record_variant(task: StepTask, name: str, before: str | None, rounds: Rounds) -> VariantRecord:
    """The record of a measured variant, with the times of the variant before it in the same rounds."""
    timed = rounds[WARM_UPS:]
    return VariantRecord(
        name=name,
        about=VARIANTS[name].about,
        settings=task.settings(),
        tolerance=tolerance(task),
        milliseconds=tuple(each[name].milliseconds for each in timed),
        milliseconds_before=tuple(each[before].milliseconds for each in timed) if before else (),
        losses=tuple(loss for each in rounds for loss in each[name].losses),
        peak_bytes=max(each[name].peak_bytes or 0 for each in timed) or None,
    )


def describe_software() -> dict[str, object]:
    """Versions, threads, date and load."""
    return {
        "overnight": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write(record: BenchRecord, folder: Path) -> None:
    """Write ladder.json, ladder.md and ladder.svg, replacing those that exist."""
    write_atomically(folder / "ladder.json", json.dumps(bench_to_json(record), indent=2) + "\n")
    write_atomically(folder / "ladder.md", bench_markdown(record))
    write_atomically(folder / "ladder.svg", bench_svg(record))
    echo(f"wrote ladder.json, ladder.md and ladder.svg into {folder}")


def read_ids(plan: BenchPlan) -> tuple[NDArray[Any], str]:
    """(the ids that one process reads, where they come from); a short text is repeated.

    Without --data, Python's documentation in GPT-2's tokens if its vocabulary is on this machine, otherwise
    in bytes: nothing is downloaded.
    """
    wanted, data = plan.tokens_to_read, plan.config.data
    if data is not None:
        return np.resize(_prepared_ids(data, plan.baseline.model.vocabulary, wanted), wanted), data
    texts, characters = [], 0
    for text in python_texts():
        texts.append(text)
        characters += len(text)
        if characters > CHARACTERS_PER_TOKEN * wanted:
            break
    folder = cache_path("gpt2", "vocab.bpe").parent
    if all(is_genuine(folder / name) for name in FILES):
        ids = np.concatenate(read_gpt2(folder).encode_batch(texts))
        return np.resize(ids, wanted), "Python's documentation"
    ids = np.frombuffer("\n".join(texts).encode(), dtype=np.uint8)
    return np.resize(ids, wanted), "the bytes of Python's documentation"


def _prepared_ids(data: str, vocab_size: int, wanted: int) -> NDArray[Any]:
    """At most `wanted` ids of the training split. Raises ValueError if they are not GPT-2's."""
    dataset = open_one_dataset(ensure_prepared(DataConfig(data=data)))
    if dataset.manifest.vocab_size > vocab_size:
        raise ValueError(
            f"{data} has a vocabulary of {dataset.manifest.vocab_size} ids, the model {vocab_size}: "
            "prepare the text with --tokenizer gpt2"
        )
    shards = (open_tokens(dataset.folder / shard.name) for shard in dataset.manifest.shards("train"))
    return np.fromiter(itertools.islice(itertools.chain.from_iterable(shards), wanted), dtype=np.int64)
