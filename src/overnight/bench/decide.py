"""What a benchmark is going to measure: tasks, groups that fit into memory, duration."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from overnight.bench import BenchConfig
from overnight.bench.variants import baseline_task, choose_variants, find_machine, stack_tasks
from overnight.bench.worker import WARM_UPS, StepTask, untimed_steps
from overnight.config import nearest
from overnight.hardware import Precision, find_memory_bytes, find_peak_flops, measure_matmul_flops
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.terminal import byte_size
from overnight.training import ComputeConfig
from overnight.training.compute import resolve_compute
from overnight.training.memory import USABLE_FRACTION, Resources, estimate_memory, rows_that_fit

# Rows of a micro-batch: the first that fit. On a GPU the lecture has 16.
ROWS_ON_CPU, ROWS_ON_GPU = (1,), (16, 8, 4, 2, 1)
GROWTH_ON_CPU, GROWTH_ON_GPU = 2, 4  # most micro-batches that the variant micro-batch merges
STEPS_ON_CPU, STEPS_ON_GPU = 3, 5
PROCESS_BYTES = 0.5e9  # a GPU's context, or torch's libraries on a CPU
SECONDS_TO_START, SECONDS_TO_COMPILE = 5, 30
SHARE_OF_PEAK = 0.5  # rough speed of a step, averaged over the variants
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class BenchPlan:
    """A benchmark with everything decided and nothing measured."""

    config: BenchConfig
    device: str
    variants: Mapping[str, str | None]
    """The reason for each variant that is skipped, None for the others; in order."""
    tasks: Mapping[str, StepTask]
    """Task of each variant that is not skipped; its ids are not written yet."""
    groups: Sequence[Sequence[str]]
    """Variants that are interleaved with one another; each group begins with the last of the one before."""
    steps: int

    @property
    def baseline(self) -> StepTask:
        """The first variant's task."""
        return next(iter(self.tasks.values()))

    @property
    def rounds(self) -> int:
        """Number of rounds, including warm-ups."""
        return WARM_UPS + self.steps

    @property
    def steps_of_process(self) -> int:
        """All steps of one process, including those that are not timed."""
        return self.rounds * (1 + untimed_steps(self.device))

    @property
    def tokens_to_read(self) -> int:
        """Tokens of one process: all its steps, one more step (a GPU prefetches it), and the last target."""
        return (self.steps_of_process + 1) * self.baseline.tokens_per_step + 1

    @property
    def precision(self) -> Precision:
        """Precision of the last variant's matrix products."""
        *_, last = self.tasks.values()
        return last.compute.precision


def decide_bench(config: BenchConfig, device: str) -> BenchPlan:
    """Decide what is left open. Raises ValueError for invalid options and for too little memory."""
    model, machine = find_bench_model(config), find_machine(device)
    names = config.variants and [name for word in config.variants for name in word.split(",")]
    free = USABLE_FRACTION * find_free_bytes(device)
    possible_rows = ROWS_ON_CPU if device == "cpu" else ROWS_ON_GPU
    for rows in possible_rows if config.rows is None else [config.rows]:
        baseline = find_baseline(model, device, rows)
        variants = choose_variants(names, machine, baseline)
        chosen = [name for name, reason in variants.items() if reason is None]
        if "micro-batch" not in chosen:
            baseline = dataclasses.replace(baseline, rows_per_step=rows, micro_batches=1)
        tasks = stack_tasks(chosen, baseline)
        if groups := divide(tasks, free):
            steps = config.steps or (STEPS_ON_CPU if device == "cpu" else STEPS_ON_GPU)
            return BenchPlan(config, device, variants, tasks, groups, steps)
    of_pairs = map(memory_of_tasks, itertools.pairwise(tasks.values()))
    needed = max(of_pairs, default=memory_of_tasks(tasks.values()))
    raise ValueError(
        f"two variants together need {byte_size(needed)}, and {device} has {byte_size(free)} free: "
        "give fewer --rows, a smaller --context-length, or a smaller --model"
    )


def find_bench_model(config: BenchConfig) -> ModelConfig:
    """The published model with the requested context length."""
    if config.model not in PRESETS:
        raise ValueError(f"there is no model {config.model}{nearest(config.model, PRESETS)}")
    problems = [
        f"--{name.replace('_', '-')} {value} must be at least 1"
        for name in ("rows", "steps", "context_length")
        if (value := getattr(config, name)) is not None and value < 1
    ]
    model = PRESETS[config.model]
    length = config.context_length or model.context_length
    if length > model.context_length:
        problems.append(f"--context-length {length} exceeds the {model.context_length} of {config.model}")
    if problems:
        raise ValueError("; ".join(problems))
    return dataclasses.replace(model, context_length=length)


def find_baseline(model: ModelConfig, device: str, rows: int) -> StepTask:
    """The step before the first variant, with micro-batches of `rows`.

    `overnight train` would compute its micro-batches as one; they are at most 2 on a CPU and 4 on a GPU, so
    that the variant micro-batch has the same step.
    """
    compute = resolve_compute(ComputeConfig(device=device), device)
    fitting = rows_that_fit(model, compute, Resources(device, find_memory_bytes(device)))
    micro_batches = max(1, min(fitting // rows, GROWTH_ON_CPU if device == "cpu" else GROWTH_ON_GPU))
    return baseline_task(model, device, rows * micro_batches, micro_batches)


def divide(tasks: Mapping[str, StepTask], memory_bytes: float) -> list[list[str]]:
    """The fewest groups that fit into memory, each beginning with the last task of the previous one.

    [] if not even two tasks fit.
    """

    def fits(names: Iterable[str]) -> bool:
        return memory_of_tasks(tasks[name] for name in names) <= memory_bytes

    groups: list[list[str]] = [[]]
    for name in tasks:
        if not fits([*groups[-1], name]):
            groups.append(groups[-1][-1:])
            if not fits([*groups[-1], name]):
                return []
        groups[-1].append(name)
    return groups


def find_free_bytes(device: str) -> float:
    """Free memory; all memory where the operating system does not report it."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    total = find_memory_bytes(device)
    if device == "cpu" and MEMINFO.is_file():
        found = re.search(r"^MemAvailable: +(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
        return min(total, int(found[1]) * 1024) if found else total
    return total


def memory_of_tasks(tasks: Iterable[StepTask]) -> float:
    """The memory of the processes of all tasks while one of them steps."""
    at_rest, most = 0.0, 0.0
    for task in tasks:
        memory = estimate_memory(task.model, task.rows_per_step // task.micro_batches, task.compute)
        kept = memory.weights + memory.moments
        if task.compute.device == "cpu":  # the heap keeps some freed memory; with large pages, all of it
            kept = memory.together if task.large_pages else kept + memory.gradients
        at_rest += PROCESS_BYTES + kept
        most = max(most, memory.together - kept)
    return at_rest + most


def estimate_seconds(plan: BenchPlan) -> float:
    """Rough duration of the whole benchmark."""
    flops = plan.steps_of_process * plan.baseline.tokens_per_step * plan.baseline.model.flops_per_token()
    tasks = [plan.tasks[name] for group in plan.groups for name in group]
    used = Counter(task.compute.precision for task in tasks)
    rates = {precision: find_peak_flops_or_measure(plan.device, precision) for precision in used}
    seconds = sum(count * flops / (SHARE_OF_PEAK * rates[precision]) for precision, count in used.items())
    compiled = {
        (task.compute, task.vocabulary_multiple, task.micro_batches) for task in tasks if task.compute.compile
    }
    return seconds + SECONDS_TO_START * len(tasks) + SECONDS_TO_COMPILE * len(compiled)


def find_peak_flops_or_measure(device: str, precision: str) -> float:
    """The published FLOP/s, or those measured on a large matrix product if none are published."""
    published = find_peak_flops(device, cast(Precision, precision))
    return measure_matmul_flops(device, precision, repeats=1) if published is None else published


def about_peak(device: str, precision: str) -> str:
    """The source of that figure, as text."""
    if find_peak_flops(device, cast(Precision, precision)) is not None:
        return f"the maker's figure for {precision}"
    return f"measured in each round: a large {precision} matrix product"
