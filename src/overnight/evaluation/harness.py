"""Every task of EleutherAI's lm-evaluation-harness, through its own interface for models.

The harness is the optional extra lm-eval. It prints, draws progress bars and seeds all random generators;
all of this is hidden from the caller.
"""

from __future__ import annotations

import difflib
import importlib.util
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from overnight.evaluation.passages import Passage, SpanResult, check_finite, cut_windows, evaluate_passages
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, complete
from overnight.model.gpt import GPT
from overnight.terminal import progress
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.training.compute import autocast

DEFAULT_NEW_TOKENS = 256  # of the harness's own HFLM, for a task that does not set it
GENERATION_SETTINGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"})
TOKENS_AT_ONCE = 8192  # prompts and completions together: 600 MB for GPT-2 124M
EMPTY_SPAN = SpanResult(0.0, True)


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of one task, or of a group of tasks, as the harness reports it."""

    task: str
    metric: str
    """acc, acc_norm, word_perplexity; with the filter's name after a comma if there is one."""
    value: float
    standard_error: float | None
    samples: int
    """Number of questions or texts."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f"   standard error {self.standard_error:.4f}"
        return f"{self.task}  {self.metric:<20}{self.value:.4f}{error}   {self.samples:,} samples"


def check_harness(names: Sequence[str], folder: str | Path | None = None) -> None:
    """Raise ValueError if the harness is not installed, or if neither it nor `folder` has one of `names`.

    A name is that of a task, a group or a tag.
    """
    with _isolated():
        _find_tasks(names, folder)


def harness_scores(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    precision: str = "fp32",
    folder: str | Path | None = None,
    limit: int | None = None,
) -> list[HarnessScore]:
    """Every metric of the named tasks and groups, in their order, as the harness computes them.

    `folder` has further tasks as YAML files; `limit` is the number of samples of each task, None for all.
    Raises ValueError as `check_harness` does, and for a task whose data or requests are not available here.
    """
    terminal = sys.stderr
    with _isolated():
        index = _find_tasks(names, folder)
        from lm_eval.evaluator import evaluate

        loaded = _load(names, index)
        _seed(loaded["tasks"].values())
        lm = build_lm(model, tokenizer, precision, terminal)
        results = evaluate(lm, loaded, limit=limit, log_samples=False)
    return list(_scores({**results["results"], **results.get("groups", {})}))


def build_lm(model: GPT, tokenizer: Tokenizer, precision: str, terminal: TextIO | None = None) -> Any:
    """A model as the harness's `lm_eval.api.model.LM`; progress bars are drawn on `terminal`."""
    from lm_eval.api.model import LM

    class OvernightLM(EvalHarnessLM, LM):  # type: ignore[misc]  # the harness has no types
        """The harness's defaults for everything except the requests."""

    return OvernightLM(model, tokenizer, precision, terminal)


def parse_request(settings: Mapping[str, Any]) -> Decoding:
    """A task's `generation_kwargs`. Raises ValueError for settings that are not supported."""
    from lm_eval.models.utils import normalize_gen_kwargs

    values = dict(normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS))
    others = {name: value for name, value in values.items() if name not in GENERATION_SETTINGS}
    unsupported = [f"{name}={value}" for name, value in others.items() if (name, value) != ("num_beams", 1)]
    if unsupported:
        raise ValueError(
            f"a task of lm-eval uses generation settings {', '.join(unsupported)} that are not supported"
        )
    sampling = SamplingConfig(temperature=0.0)
    if values["do_sample"]:
        sampling = SamplingConfig(
            temperature=float(values.get("temperature", 1.0)),
            top_k=values.get("top_k") or None,
            top_p=values.get("top_p"),
        )
    stop = tuple(text for text in values["until"] if text)
    return Decoding(max_new_tokens=values["max_gen_toks"], sampling=sampling, stop=stop)


def _load(names: Sequence[str], index: Any) -> dict[str, dict[str, Any]]:
    """The tasks and groups of all names, with their data."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name in names:
        try:
            found = index.load([name])
        except Exception as error:  # from a task's own code, its packages or the network
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"lm-eval's task {name} cannot be loaded ({reason}): most tasks download their data from "
                "Hugging Face once, so run it with a network, or name with --task-files a folder with a YAML "
                "file of a task over local files"
            ) from None
        for kind, entries in loaded.items():
            entries.update(found[kind])
    return loaded


def _seed(tasks: Iterable[Any]) -> None:
    """Set each task's number of examples and the harness's seeds, as `simple_evaluate` does first."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[HarnessScore]:
    """Read the harness's table: `metric,filter` -> value, `metric_stderr,filter` -> standard error."""
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            yield HarnessScore(
                task=task,
                metric=metric if name == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                samples=values["sample_len"],
            )


def _find_tasks(names: Sequence[str], folder: str | Path | None) -> Any:
    """The harness's TaskManager, with all of `names`; errors as in `check_harness`.

    Indexing all of its 14,000 files takes ten seconds. Searching them for the names, and indexing only the
    folders that mention one, takes two.
    """
    specification = importlib.util.find_spec("lm_eval")
    if specification is None or specification.origin is None:
        raise ValueError(
            "lm-evaluation-harness is not installed: pip install 'overnight[lm-eval]', or leave out the "
            "tasks that begin with lm-eval:"
        )
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"the folder {folder} with tasks of lm-eval does not exist")
    from lm_eval.tasks import TaskManager

    own = [] if folder is None else [Path(folder)]
    root = Path(specification.origin).parent / "tasks"
    mention = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, names))})(?![\w.-])")
    found = {path for path in root.rglob("*.yaml") if mention.search(path.read_text(encoding="utf-8"))}
    # Of two files that define a name, the default index takes the first, and include_path the last.
    folders = sorted({root / path.relative_to(root).parts[0] for path in found}, reverse=True)
    index = TaskManager(include_defaults=False, include_path=[*folders, *own])
    if not set(names) <= set(index.all_subtasks):  # groups and tags have tasks from any folder
        index = TaskManager(include_path=own)
    for name in names:
        if name not in index.task_index:
            near = difflib.get_close_matches(name, index.all_tasks, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists all tasks"
            raise ValueError(f"lm-eval has no task {name}; {remedy}")
    return index


@contextmanager
def _isolated() -> Iterator[None]:
    """Context manager: nothing is printed and no warning shown; restores all random states at the end."""
    states = random.getstate(), np.random.get_state()
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class EvalHarnessLM:
    """Answers the harness's requests in their order; `build_lm` adds the harness's own base class."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, precision: str, terminal: TextIO | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self.terminal = terminal or sys.stderr

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation), the continuation's log-likelihood and whether it is greedy.

        The first ids of a context that is too long are dropped; an empty one becomes the end of text. Raises
        ValueError for a continuation longer than the model's context.
        """
        pairs = [request.args for request in requests]
        context_length = self.model.config.context_length
        contexts = self.tokenizer.encode_batch([context.rstrip() for context, _ in pairs])
        wholes = self.tokenizer.encode_batch([context + continuation for context, continuation in pairs])
        passages: list[Passage] = []
        for context, whole in zip(contexts, wholes, strict=True):
            # The spaces that end a context belong to the first id of the continuation.
            continuation = whole[len(context) :].tolist()
            if len(continuation) > context_length:
                raise ValueError(
                    f"a continuation of {len(continuation):,} tokens does not fit the model's context of "
                    f"{context_length:,}: leave this task out, or use a model with a longer context"
                )
            ids = (context.tolist() or [self.tokenizer.end_of_text]) + continuation
            passages.append(Passage(ids[-context_length - 1 :], len(continuation)))
        return [(-span.nats, span.is_greedy) for span in self._evaluate(passages)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each whole text after an end of text, in windows without overlap."""
        context_length = self.model.config.context_length
        windows = [
            list(cut_windows([self.tokenizer.end_of_text, *ids.tolist()], context_length))
            for ids in self.tokenizer.encode_batch([request.args[0] for request in requests])
        ]
        spans = iter(self._evaluate(list(chain.from_iterable(windows))))
        return [-sum(span.nats for span in islice(spans, len(each))) for each in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The completion of each prompt, up to its first stop string, the end of text or its length limit.

        The first ids of a prompt that is too long are dropped. Raises ValueError for a request that leaves no
        room for a prompt.
        """
        context_length = self.model.config.context_length
        texts = [""] * len(requests)
        prompts = self.tokenizer.encode_batch([request.args[0] for request in requests])
        groups: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(parse_request(request.args[1]), []).append(index)
        with redirect_stderr(self.terminal), progress("completions", len(requests), "texts") as advance:
            for decoding, indices in groups.items():
                room = context_length - decoding.max_new_tokens
                if room < 1:
                    raise ValueError(
                        f"a completion of {decoding.max_new_tokens:,} tokens leaves no room for a prompt in "
                        f"the model's context of {context_length:,}: leave this task out"
                    )
                rows = {index: prompts[index].tolist()[-room:] for index in indices}
                for first_row, batch in _batches(rows, decoding.max_new_tokens):
                    part = replace(decoding, first_row=first_row)
                    with autocast(self.model.wte.weight.device.type, self.precision):
                        found = complete(self.model, self.tokenizer, [rows[each] for each in batch], part)
                    for index, completion in zip(batch, found, strict=True):
                        texts[index] = completion.text
                    advance(len(batch))
        return texts

    def _evaluate(self, passages: Sequence[Passage]) -> list[SpanResult]:
        """All passages, with a progress bar. A passage without targets has no nats."""
        results = [EMPTY_SPAN] * len(passages)
        indices = [index for index, passage in enumerate(passages) if passage.scored]
        scored = [passages[index] for index in indices]
        with redirect_stderr(self.terminal), progress("likelihoods", len(indices), "rows") as advance:
            for number, span in evaluate_passages(self.model, scored, self.precision):
                check_finite(span, "the model on lm-eval's requests", self.precision)
                results[indices[number]] = span
                advance()
        return results


def _batches(rows: Mapping[int, Sequence[int]], new_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Indices of rows of similar length, at most TOKENS_AT_ONCE, and the number of rows before them."""
    order = sorted(rows, key=lambda index: (-len(rows[index]), index))
    first = 0
    while first < len(order):
        count = max(1, TOKENS_AT_ONCE // (len(rows[order[first]]) + new_tokens))
        yield first, order[first : first + count]
        first += count
