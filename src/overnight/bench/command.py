"""The command `overnight ladder`: a training step, faster rung by rung, on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from overnight import __version__
from overnight.bench import BenchConfig
from overnight.bench.table import (
    BenchRecord,
    VariantRecord,
    bench_markdown,
    bench_svg,
    bench_text,
    bench_to_json,
    wrong_variants,
)
from overnight.bench.variants import (
    Machine,
    Selection,
    Variant,
    baseline_compute,
    choose_variants,
    find_machine,
    tolerance,
)
from overnight.bench.worker import StepTask, TimedSteps, interleave, running_workers, untimed_steps
from overnight.config import nearest
from overnight.data import DataConfig
from overnight.data.dataset import open_one_dataset
from overnight.data.shards import open_tokens
from overnight.distributed.world import open_world
from overnight.hardware import (
    Precision,
    find_device_name,
    find_memory_bytes,
    find_peak_flops,
    measure_matmul_flops,
)
from overnight.model.model_config import PRESETS, ModelConfig
from overnight.preparation.prepare import ensure_prepared
from overnight.preparation.sources import python_documents
from overnight.report.plots import check_matplotlib
from overnight.run_directory import cache_folder, write_atomically
from overnight.terminal import duration, echo
from overnight.tokenizer.bpe import FILES, is_genuine, read_gpt2
from overnight.training.memory import USABLE_FRACTION, Resources, estimate_memory, rows_that_fit

COLUMNS = 80
BUSY_SHARE = 0.5  # of all processors kept busy by others: from there on the figures are noisy


def run(config: BenchConfig) -> BenchRecord:
    """Measure, show, write. Raises FloatingPointError in the end if a rung computes something else."""
    if config.out is not None:
        check_matplotlib()  # the drawing comes last: minutes from here
        if Path(config.out).is_file():
            raise ValueError(f"--out {config.out} is a file; name a folder")
    ladder = measure_variants(plan_bench(config, open_world(config.device).device))
    echo(bench_text(ladder, shutil.get_terminal_size().columns))  # 80 where there is no terminal
    if config.json:
        sys.stdout.write(json.dumps(bench_to_json(ladder), indent=2) + "\n")
    if config.out is not None:
        write(ladder, Path(config.out))
    echo(f"next: overnight train {config.model}")
    if wrong := wrong_variants(ladder):
        raise FloatingPointError(
            f"{', '.join(wrong)}: the losses differ from float32's by more than rounding explains; "
            "do not train with these settings on this machine"
        )
    return ladder


class Measurements(NamedTuple):
    """What one rung did in its group's rounds, and what the rung before it did in the same."""

    turns: list[TimedSteps]
    turns_before: list[TimedSteps]
    """None for the first rung."""


def measure_variants(plan: BenchPlan) -> BenchRecord:
    """Let the rungs step in turn, and put together what that shows."""
    ids, origin = read_ids(plan)
    announce(plan, origin)
    climbed: dict[str, Measurements] = {}
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ids.npy"
        np.save(place, ids)
        for group in plan.groups:
            rounds = []
            with running_workers(
                {name: replace(plan.tasks[name], ids=str(place)) for name in group}
            ) as processes:
                for turns in interleave(processes, plan.steps, WARM_UPS, plan.ground.tokens_per_step):
                    rounds.append(turns)
                    rates.append(find_peak_flops_or_measure(plan.machine.device, plan.precision))
            climbed = pair_up(group, rounds) | climbed
    return build_record(plan, climbed, statistics.median(rates), origin)


def pair_up(group: Sequence[str], rounds: Sequence[Mapping[str, TimedSteps]]) -> dict[str, Measurements]:
    """Each rung's turns beside those of the rung before it in the same group."""
    turns = {name: [each[name] for each in rounds] for name in group}
    before = dict(zip(group[1:], group, strict=False))
    return {name: Measurements(turns[name], turns[before[name]] if name in before else []) for name in group}


def announce(plan: BenchPlan, origin: str) -> None:
    """Say what each rung is, which are skipped, and how long all of it will take."""
    echo(f"{plan.model_name} in training, each rung on top of those before it:")
    wide = max(len(rung.name) for rung in plan.climb.rungs)
    for rung in plan.climb.rungs:
        skipped = plan.climb.skipped.get(rung.name)
        echo(f"  {rung.name:<{wide}}  {f'skipped: {skipped}' if skipped else rung.about}")
    if len(plan.groups) > 1:
        groups = ", then ".join(f"{group[0]} to {group[-1]}" for group in plan.groups)
        echo(textwrap.fill(f"As many take turns as memory holds: {groups}.", COLUMNS))
    seconds = estimate_seconds(plan)
    echo(f"{plan.rounds} rounds on {origin}, about {duration(seconds)}.")
    if (load := os.getloadavg()[0]) > BUSY_SHARE * (os.cpu_count() or 1):
        echo(f"The machine has other work (load {load:.1f}), so expect noise.")
    echo()


def build_record(
    plan: BenchPlan, climbed: Mapping[str, Measurements], peak_flops: float, origin: str
) -> BenchRecord:
    """The ladder as it was climbed; `peak_flops` is what MFU is to be a share of."""
    ground = plan.ground
    rows, tokens = ground.rows_per_step, ground.tokens_per_step
    return BenchRecord(
        model=plan.model_name,
        device_name=find_device_name(plan.machine.device),
        tokens_per_step=tokens,
        about_step=f"a step of {rows} x {ground.model.context_length:,} = {tokens:,} tokens",
        flops_per_token=ground.model.flops_per_token(),
        peak_flops=peak_flops,
        about_peak=about_peak(plan.machine.device, plan.precision),
        rungs=tuple(build_variant_record(rung, plan, climbed) for rung in plan.climb.rungs),
        groups=tuple(map(tuple, plan.groups)),
        environment={"text": origin, **describe_software()},
    )


def build_variant_record(
    rung: Variant, plan: BenchPlan, climbed: Mapping[str, Measurements]
) -> VariantRecord:
    """One rung of it."""
    if rung.name in plan.climb.skipped:
        return VariantRecord(name=rung.name, about=rung.about, skipped=plan.climb.skipped[rung.name])
    turns, before = climbed[rung.name]
    peaks = [turn.peak_bytes for turn in turns[WARM_UPS:] if turn.peak_bytes is not None]
    return VariantRecord(
        name=rung.name,
        about=rung.about,
        settings=plan.tasks[rung.name].settings(),
        tolerance=tolerance(plan.tasks[rung.name]),
        milliseconds=tuple(turn.milliseconds for turn in turns[WARM_UPS:]),
        milliseconds_before=tuple(turn.milliseconds for turn in before[WARM_UPS:]),
        losses=tuple(loss for turn in turns for loss in turn.losses),
        peak_bytes=max(peaks, default=None),
    )


def describe_software() -> dict[str, object]:
    """Versions, threads, date, and how busy the machine is."""
    return {
        "overnight": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write(ladder: BenchRecord, folder: Path) -> None:
    """ladder.json, ladder.md and ladder.svg; what is there already is replaced."""
    write_atomically(folder / "ladder.json", json.dumps(bench_to_json(ladder), indent=2) + "\n")
    write_atomically(folder / "ladder.md", bench_markdown(ladder))
    write_atomically(folder / "ladder.svg", bench_svg(ladder))
    echo(f"wrote ladder.json, ladder.md and ladder.svg into {folder}")


# ---------------------------------------------------------------- what a speed ladder is about to do


# Rows of a micro-batch: the first that fit. On a GPU the lecture has 16.
ROWS_ON_CPU, ROWS_ON_GPU = (1,), (16, 8, 4, 2, 1)
GROWTH_ON_CPU, GROWTH_ON_GPU = 2, 4  # how many micro-batches the rung micro-batch makes one of
WARM_UPS = 2  # in its second step a process's heap still grows
STEPS_ON_CPU, STEPS_ON_GPU = 3, 5

PROCESS_BYTES = 0.5e9  # of a process: a GPU's context, or torch's libraries and what Python keeps of them
CHARACTERS_PER_TOKEN = 6  # more than English has, so that enough text is read
SECONDS_TO_START, SECONDS_TO_COMPILE = 5, 30
SHARE_OF_PEAK = 0.5  # what a step reaches of it, roughly, over all rungs

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class BenchPlan:
    """Everything decided, nothing measured."""

    model_name: str
    data: str | None
    machine: Machine
    climb: Selection
    ground: StepTask
    """The first rung's; its ids are not written yet."""
    tasks: Mapping[str, StepTask]
    groups: Sequence[Sequence[str]]
    """The rungs that take turns with one another; each group begins with the last one of the group before."""
    steps: int

    @property
    def rounds(self) -> int:
        """Those that warm up included."""
        return WARM_UPS + self.steps

    @property
    def steps_per_round(self) -> int:
        """Those that are not timed included."""
        return 1 + untimed_steps(self.machine.device)

    @property
    def tokens_to_read(self) -> int:
        """Of all steps of one process, one step more, since a GPU's are read ahead, and the last target."""
        return (self.rounds * self.steps_per_round + 1) * self.ground.tokens_per_step + 1

    @property
    def precision(self) -> str:
        """The precision that the highest rung multiplies in."""
        *_, highest = self.tasks.values()
        return highest.compute.precision


def plan_bench(config: BenchConfig, device: str) -> BenchPlan:
    """Decide what is open. Raises ValueError for what was asked wrongly, and for what memory can't hold."""
    model = find_bench_model(config)
    machine = find_machine(device)
    names = None if config.rungs is None else [name for word in config.rungs for name in word.split(",")]
    free = USABLE_FRACTION * find_free_bytes(device)
    possible_rows = ROWS_ON_CPU if device == "cpu" else ROWS_ON_GPU
    for rows in possible_rows if config.rows is None else [config.rows]:
        ground = find_baseline(model, device, rows)
        climb = choose_variants(names, machine, ground)
        if "micro-batch" not in climb.tasks(ground):
            ground = dataclasses.replace(ground, rows_per_step=rows, micro_batches=1)
        tasks = climb.tasks(ground)
        groups = divide(tasks, free)
        if groups:
            steps = config.steps or (STEPS_ON_CPU if device == "cpu" else STEPS_ON_GPU)
            return BenchPlan(config.model, config.data, machine, climb, ground, tasks, groups, steps)
    pairs: Sequence[Sequence[StepTask]] = list(itertools.pairwise(tasks.values())) or [list(tasks.values())]
    needed = max(estimate_bytes(pair) for pair in pairs)
    raise ValueError(
        f"two rungs at a time need {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB to spare: "
        "take fewer --rows, a smaller --context-length, or a smaller --model"
    )


def divide(tasks: Mapping[str, StepTask], memory_bytes: float) -> list[list[str]]:
    """As few groups as memory allows, each beginning with the last rung before it; [] if not even two fit."""
    groups: list[list[str]] = [[]]
    for name, task in tasks.items():
        if estimate_bytes([*(tasks[each] for each in groups[-1]), task]) > memory_bytes:
            groups.append(groups[-1][-1:])
            if estimate_bytes([*(tasks[each] for each in groups[-1]), task]) > memory_bytes:
                return []
        groups[-1].append(name)
    return groups


def find_baseline(model: ModelConfig, device: str, rows: int) -> StepTask:
    """The step below the first rung: everything as plain as can be.

    It has as many micro-batches as `overnight train` would take for one, but at most 2 on a CPU and 4
    on a GPU, so that a larger micro-batch can be a rung of its own, with the same step.
    """
    compute = baseline_compute(device)
    at_once = rows_that_fit(model, compute, Resources(device, find_memory_bytes(device)))
    micro_batches = max(1, min(at_once // rows, GROWTH_ON_CPU if device == "cpu" else GROWTH_ON_GPU))
    return StepTask(
        model=model,
        compute=baseline_compute(device),
        ids="",
        rows_per_step=rows * micro_batches,
        micro_batches=micro_batches,
        vocabulary_multiple=1,
        fused_optimizer=False,
        large_pages=False,
    )


def find_bench_model(config: BenchConfig) -> ModelConfig:
    """The model that is named, its context shortened if asked for."""
    if config.model not in PRESETS:
        raise ValueError(f"there is no model {config.model}{nearest(config.model, PRESETS)}")
    problems = [
        f"--{name.replace('_', '-')} {value} is too few; give at least 1"
        for name in ("rows", "steps", "context_length")
        if (value := getattr(config, name)) is not None and value < 1
    ]
    model = PRESETS[config.model]
    length = config.context_length or model.context_length
    if length > model.context_length:
        problems.append(
            f"--context-length {length} is more than the {model.context_length} of {config.model}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return dataclasses.replace(model, context_length=length)


# ---------------------------------------------------------------- what it takes


def find_free_bytes(device: str) -> float:
    """Memory that nobody holds. Where the operating system does not say, all that there is."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    everything = find_memory_bytes(device)
    if device == "cpu" and MEMINFO.is_file():
        found = re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
        return min(everything, int(found[1]) * 1024) if found else everything
    return everything


def estimate_bytes(tasks: Iterable[StepTask]) -> float:
    """The memory of all these processes while any one of them steps."""
    at_rest, most = 0.0, 0.0
    for task in tasks:
        memory = estimate_memory(task.model, task.rows_per_step // task.micro_batches, task.compute)
        kept = memory.weights + memory.moments
        if task.compute.device == "cpu":  # the heap keeps some of what was freed; with large pages all of it
            kept = memory.together if task.large_pages else kept + memory.gradients
        at_rest += PROCESS_BYTES + kept
        most = max(most, memory.together - kept)
    return at_rest + most


def estimate_seconds(plan: BenchPlan) -> float:
    """Of the whole ladder, roughly."""
    device, steps = plan.machine.device, plan.rounds * plan.steps_per_round
    flops = plan.ground.tokens_per_step * plan.ground.model.flops_per_token()
    tasks = [plan.tasks[name] for group in plan.groups for name in group]
    precisions = {str(task.compute.precision) for task in tasks}
    rates = {precision: find_peak_flops_or_measure(device, precision) for precision in precisions}
    seconds = sum(steps * flops / (SHARE_OF_PEAK * rates[str(task.compute.precision)]) for task in tasks)
    compiled = {
        (task.compute, task.vocabulary_multiple, task.micro_batches) for task in tasks if task.compute.compile
    }
    return seconds + SECONDS_TO_START * len(tasks) + SECONDS_TO_COMPILE * len(compiled)


def find_peak_flops_or_measure(device: str, precision: str) -> float:
    """The FLOP/s that the maker publishes; where none are known, those of a large matrix product."""
    published = find_peak_flops(device, cast(Precision, precision))
    return measure_matmul_flops(device, precision, repeats=1) if published is None else published


def about_peak(device: str, precision: str) -> str:
    """Where that figure comes from, in words."""
    if find_peak_flops(device, cast(Precision, precision)) is not None:
        return f"the maker's figure for {precision}"
    return f"measured in each round: a large {precision} matrix product"


# ---------------------------------------------------------------- the text


def read_ids(plan: BenchPlan) -> tuple[NDArray[Any], str]:
    """As many ids as the steps read, and in words where they come from; a short text begins again.

    From a prepared folder or a source to be prepared, if one is named. Else from Python's documentation,
    in GPT-2's tokens if its vocabulary is on this machine, in bytes if not: nothing is downloaded for this.
    """
    vocab_size, wanted = plan.ground.model.vocab_size, plan.tokens_to_read
    assert vocab_size is not None
    if plan.data is not None:
        return np.resize(_prepared_ids(plan.data, vocab_size, wanted), wanted), plan.data
    texts, characters = [], 0
    for document in python_documents():
        texts.append(document.text)
        characters += len(document.text)
        if characters > CHARACTERS_PER_TOKEN * wanted:
            break
    folder = cache_folder() / "gpt2"
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
            f"{data} is written with {dataset.manifest.vocab_size} ids and the model knows {vocab_size}: "
            "prepare the text with --tokenizer gpt2"
        )
    parts, missing = [], wanted
    for shard in dataset.manifest.shards("train"):
        parts.append(open_tokens(dataset.folder / shard.name)[:missing])
        missing -= parts[-1].size
    return np.concatenate(parts)
