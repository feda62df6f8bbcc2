"""What a speed ladder is about to do: its rungs, its step, its text; what that takes in memory and time."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from overnight.batching import estimate_rows_that_fit
from overnight.cache import cache_folder
from overnight.data.python_docs import python_documents
from overnight.hardware import Precision, find_memory_bytes, find_peak_flops
from overnight.measurement import measure_matmul_flops
from overnight.memory import USABLE_FRACTION, estimate_memory
from overnight.model.config import PRESETS, ModelConfig
from overnight.settings import nearest
from overnight.stages.rungs import Climb, Machine, choose_rungs, find_machine, ground_compute
from overnight.stages.stepper import StepTask, untimed_steps
from overnight.text.gpt2 import FILES, is_genuine, read_gpt2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from overnight.stages.ladder import LadderConfig

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
class LadderPlan:
    """Everything decided, nothing measured."""

    model_name: str
    data: str | None
    machine: Machine
    climb: Climb
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
        assert highest.compute.precision is not None
        return highest.compute.precision


def plan_ladder(config: LadderConfig, device: str) -> LadderPlan:
    """Decide what is open. Raises ValueError for what was asked wrongly, and for what memory can't hold."""
    model = find_model(config)
    machine = find_machine(device)
    names = None if config.rungs is None else [name for word in config.rungs for name in word.split(",")]
    free = USABLE_FRACTION * find_free_bytes(device)
    possible_rows = ROWS_ON_CPU if device == "cpu" else ROWS_ON_GPU
    for rows in possible_rows if config.rows is None else [config.rows]:
        ground = find_ground(model, device, rows)
        climb = choose_rungs(names, machine, ground)
        if "micro-batch" not in climb.tasks(ground):
            ground = dataclasses.replace(ground, rows_per_step=rows, micro_batches=1)
        tasks = climb.tasks(ground)
        groups = divide(tasks, free)
        if groups:
            steps = config.steps or (STEPS_ON_CPU if device == "cpu" else STEPS_ON_GPU)
            return LadderPlan(config.model, config.data, machine, climb, ground, tasks, groups, steps)
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


def find_ground(model: ModelConfig, device: str, rows: int) -> StepTask:
    """The step below the first rung: everything as plain as can be.

    It has as many micro-batches as `overnight train` would take for one, but at most 2 on a CPU and 4
    on a GPU, so that a larger micro-batch can be a rung of its own, with the same step.
    """
    at_once = estimate_rows_that_fit(model, find_memory_bytes(device), device)
    micro_batches = max(1, min(at_once // rows, GROWTH_ON_CPU if device == "cpu" else GROWTH_ON_GPU))
    return StepTask(
        model=model,
        compute=ground_compute(device),
        ids="",
        rows_per_step=rows * micro_batches,
        micro_batches=micro_batches,
        vocabulary_multiple=1,
        fused_optimizer=False,
        large_pages=False,
    )


def find_model(config: LadderConfig) -> ModelConfig:
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
        import torch

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


def estimate_seconds(plan: LadderPlan) -> float:
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


def read_ids(plan: LadderPlan) -> tuple[NDArray[Any], str]:
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
    from overnight.data.token_file import open_tokens
    from overnight.stages.materials import DataConfig, open_materials

    materials = open_materials(DataConfig(data=data))
    if materials.manifest.vocab_size > vocab_size:
        raise ValueError(
            f"{data} is written with {materials.manifest.vocab_size} ids and the model knows {vocab_size}: "
            "prepare the text with --tokenizer gpt2"
        )
    parts, missing = [], wanted
    for shard in materials.manifest.shards("train"):
        parts.append(open_tokens(materials.folder / shard.name)[:missing])
        missing -= parts[-1].size
    return np.concatenate(parts)
