"""Tasks that a run is judged on while it trains: opened before it begins, judged without a trace in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from overnight.evaluation.scores import Score
from overnight.evaluation.tasks import Example, Judgement, Numbers, Task, judge
from overnight.model.gpt import GPT
from overnight.sharding import SHARDS, gather_model
from overnight.stages.job import Job
from overnight.stages.recipe import EvaluationConfig
from overnight.stages.tasks import HARNESS, open_tasks, split_names
from overnight.text.tokenizer import Tokenizer
from overnight.watch import Watch
from overnight.world import ALONE, World


@dataclass(frozen=True)
class RunTask:
    """A task, its examples as ids."""

    task: Task
    examples: Sequence[Example]


def open_run_tasks(config: EvaluationConfig, tokenizer: Tokenizer, context_length: int) -> list[RunTask]:
    """The tasks of a recipe. Raises ValueError for one that there is not, or whose file is not there."""
    if not config.tasks:
        return []
    names = split_names(config.tasks)
    if names.harness or names.validation:
        raise ValueError(
            f"tasks={', '.join(config.tasks)}: a run is judged on validation text by evaluate_every_steps, "
            f"and on {HARNESS}NAME only by `overnight evaluate`"
        )
    tasks = open_tasks(names.own, config.task_files, config.task_examples)
    return [RunTask(task, task.encode(tokenizer, context_length)) for task in tasks]


def judge_run(job: Job, tasks: Sequence[RunTask], watch: Watch) -> list[Score]:
    """What the model as it is now makes of each; the same in all processes.

    They divide the examples; of a model in shards, the first process judges all of it.
    """
    is_whole = job.sharding not in SHARDS
    model = job.state.model if is_whole else gather_model(job.state.model, job.world)
    found: list[Score] = []
    for each in tasks:
        mine = list(_judge_share(each, model, job, ALONE if not is_whole else job.world, watch))
        with watch.paused() if job.world.size > 1 else nullcontext():
            told = job.world.gather(json.dumps(mine))
        numbers = {place: tuple(values) for share in told for place, values in json.loads(share)}
        judgement = Judgement(each.examples, [numbers[place] for place in range(len(each.examples))])
        found += each.task.score(judgement, None)
    return found


def _judge_share(
    each: RunTask, model: GPT | None, job: Job, world: World, watch: Watch
) -> Iterator[tuple[int, Numbers]]:
    """What falls to this process; each example is a sign of life."""
    if model is None:
        return
    precision = job.recipe.compute.precision or "fp32"
    for pair in judge(model, each.examples, precision, world):
        watch.still_going()
        yield pair
