"""Evaluations during a run: held-out loss, tasks, and statistics of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

from overnight.data.loader import TokenStream
from overnight.data.mixture import Concatenation, Mixture
from overnight.distributed.watchdog import Watchdog
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.passages import gather_results
from overnight.evaluation.perplexity import (
    TextLoss,
    evaluate_language_model,
    evaluation_rows,
    pool_losses,
)
from overnight.evaluation.scores import Example, Score, TaskResult
from overnight.evaluation.tasks import HARNESS, Task, evaluate_task, open_task, split_names
from overnight.model.gpt import GPT
from overnight.recipe import EvaluationConfig
from overnight.run.setup import RunSetup
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.training.sharding import FULLY_SHARDED, gather_model, reshard
from overnight.training.state import local_shard

Item = TypeVar("Item")


def evaluate_validation(run: RunSetup, watch: Watchdog) -> tuple[TextLoss, list[dict[str, Any]]]:
    """The held-out loss, and one record for each source of a mixture ([] of a single text)."""
    wanted = run.resolved.recipe.evaluation.evaluation_tokens
    if not isinstance(run.validation, Concatenation):
        return _evaluate_stream(run, run.validation, wanted, watch), []
    streams = zip(run.validation.streams, run.validation.evaluation_tokens(wanted), strict=True)
    parts = [_evaluate_stream(run, stream, tokens, watch) for stream, tokens in streams]
    return pool_losses(parts), _describe_sources(run, parts)


def _evaluate_stream(run: RunSetup, stream: TokenStream, tokens: int | None, watch: Watchdog) -> TextLoss:
    model, dataset = run.state.model, run.dataset
    batches = _with_heartbeat(stream.evaluation_batches(evaluation_rows(model), tokens), watch)
    loss = evaluate_language_model(
        model,
        batches,
        dataset.tokenizer.token_bytes(),
        run.resolved.compute.precision,
        dataset.document_separator,
        world=run.world,
    )
    reshard(model)
    return loss


def _with_heartbeat(items: Iterable[Item], watch: Watchdog) -> Iterator[Item]:
    for item in items:
        watch.heartbeat()
        yield item


def _describe_sources(run: RunSetup, parts: Sequence[TextLoss]) -> list[dict[str, Any]]:
    """For each source of a mixture, its validation loss and how much of it was trained on."""
    if not isinstance(run.train, Mixture):
        return []
    plan = run.resolved.plan
    rows = plan.tokens_before(run.state.step) // plan.tokens_per_row
    seen = zip(
        run.train.names, parts, run.train.rows_of_each(rows), run.train.epochs_of_each(rows), strict=True
    )
    return [
        {
            "source": name,
            "loss": part.summary().loss,
            "evaluated_tokens": part.summary().evaluated_tokens,
            "tokens": count * plan.tokens_per_row,
            "epochs": round(epochs, 6),
        }
        for name, part, count, epochs in seen
    ]


class RunTask(NamedTuple):
    """A task and its examples as ids."""

    task: Task
    examples: Sequence[Example]


def open_run_tasks(config: EvaluationConfig, tokenizer: Tokenizer, context_length: int) -> list[RunTask]:
    """The tasks of a recipe. Raises ValueError for an unknown task, and if a task's file is missing."""
    if not config.tasks:
        return []
    names = split_names(config.tasks)
    if names.harness or names.validation:
        raise ValueError(
            f"tasks={', '.join(config.tasks)}: a run evaluates validation text by evaluate_every_steps, and "
            f"{HARNESS}NAME only with `overnight evaluate`"
        )
    tasks = [open_task(name, config.task_files, config.task_examples) for name in names.own]
    return [RunTask(task, task.encode(tokenizer, context_length)) for task in tasks]


def evaluate_run_tasks(run: RunSetup, tasks: Sequence[RunTask], watch: Watchdog) -> list[Score]:
    """The scores of the model at this step; the same in all processes.

    Processes divide the examples; a sharded model is gathered and evaluated by the first process.
    """
    world, is_whole = run.world, run.resolved.compute.sharding not in FULLY_SHARDED
    model = run.state.model if is_whole else gather_model(run.state.model, world)
    scores: list[Score] = []
    for each in tasks:
        among = world if is_whole else SINGLE_PROCESS
        found = evaluate_task(model, each.examples, run.resolved.compute.precision, among) if model else ()
        own = list(_with_heartbeat(found, watch))
        with watch.paused() if world.size > 1 else nullcontext():
            numbers = gather_results(own, world)
        scores += each.task.score([TaskResult(each.examples, numbers)])
    return scores


def score_event(score: Score) -> dict[str, object]:
    """A score as a line of events/tasks.jsonl."""
    return {
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        **(dataclasses.asdict(score.interval) if score.interval else {}),
        "examples": score.examples,
        "chance": score.chance,
    }


# ---------------------------------------------------------------- statistics of weights

NORM_GAINS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")
INTO_RESIDUAL = ("attn.c_proj.weight", "mlp.c_proj.weight")
BESIDE_RESIDUAL = ("mlp.c_fc.weight",)


@torch.no_grad()
def describe_weights(model: GPT, world: World) -> dict[str, float]:
    """The mean gain of all layer norms and the residual ratio, which show mistakes that the loss hides.

    The ratio is the standard deviation of the weights that write into the residual stream over that of
    c_fc's: 1 / sqrt(2 n_layer) at initialisation. Neither is given
    of a model without such weights. All processes must call it: each adds up its own shards.
    """
    kinds = (NORM_GAINS, INTO_RESIDUAL, BESIDE_RESIDUAL)
    sums = torch.zeros(len(kinds), 3, device=model.wte.weight.device)
    for name, parameter in model.named_parameters():
        for kind, endings in enumerate(kinds):
            if name.endswith(endings):
                rows = local_shard(parameter.detach())[0].float()
                sums[kind] += torch.stack([sums.new_tensor(rows.numel()), rows.sum(), rows.square().sum()])
    world.all_reduce([sums])
    gains, into, beside = sums.cpu().tolist()
    found = {"norm_gain": gains[1] / gains[0]} if gains[0] else {}
    if beside[0]:
        # 0 where every weight is infinite.
        found["residual_ratio"] = _deviation(into) / (_deviation(beside) or math.nan)
    return found


def _deviation(sums: list[float]) -> float:
    """The standard deviation, from (count, sum, sum of squares)."""
    count, total, squares = sums
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
