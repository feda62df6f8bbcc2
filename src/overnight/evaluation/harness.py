"""Every task of EleutherAI's lm-evaluation-harness, through its own interface for models.

The harness is the optional extra lm-eval. It prints, draws bars and seeds everybody's random numbers; none of
that reaches the caller.
"""

from __future__ import annotations

import difflib
import importlib.util
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from overnight.evaluation.passages import Passage, SpanResult, cut_windows, evaluate_passages
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, TextWriter, stream_ids
from overnight.model.gpt import GPT
from overnight.terminal import progress
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.training.compute import autocast

DEFAULT_NEW_TOKENS = 256  # of the harness's own HFLM, where a task says nothing
WISHES = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"})


@dataclass(frozen=True, kw_only=True)
class HarnessScore:
    """One metric of one task, or of a group of tasks, as the harness states it."""

    task: str
    metric: str
    """acc, acc_norm, word_perplexity; with the filter's name behind a comma where there is one."""
    value: float
    standard_error: float | None
    samples: int
    """Questions or texts that were judged."""

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f"   standard error {self.standard_error:.4f}"
        return f"{self.task}  {self.metric:<20}{self.value:.4f}{error}   {self.samples:,} samples"


def check_harness(names: Sequence[str], folder: Path | None = None) -> None:
    """Raise ValueError if the harness is not installed, or does not know one of `names`, nor `folder` it.

    A name is a task's, a group's or a tag's.
    """
    with _undisturbed():
        _find_tasks(names, folder)


def harness_scores(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    precision: str = "fp32",
    folder: Path | None = None,
    limit: int | None = None,
) -> list[HarnessScore]:
    """Every metric of the named tasks and groups, in their order, each as the harness computes it.

    `folder` holds further tasks as YAML files; `limit` is how many samples of each task, None for all. Raises
    ValueError as `check_harness` does, and for a task that can't be had or asked on this machine.
    """
    terminal = sys.stderr
    with _undisturbed():
        index = _find_tasks(names, folder)
        from lm_eval.evaluator import evaluate

        asked: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
        for name in names:
            for kind, found in _load(name, index).items():
                asked.setdefault(kind, {}).update(found)
        _seed(asked["tasks"].values())
        lm = build_lm(EvalHarnessLM(model, tokenizer, precision), terminal)
        results = evaluate(lm, asked, limit=limit, log_samples=False)
    return list(_scores({**results["results"], **results.get("groups", {})}))


def build_lm(answers: EvalHarnessLM, terminal: TextIO | None = None) -> Any:
    """The harness's model interface, `lm_eval.api.model.LM`, to `answers`; bars are drawn on `terminal`."""
    from lm_eval.api.model import LM

    class OvernightLM(LM):  # type: ignore[misc]  # the harness has no types
        """One process, which hands the harness's requests on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Of each (context, continuation): its log-likelihood, and whether it is greedy decoding's."""
            with redirect_stderr(terminal or sys.stderr):
                found = answers.likelihoods([request.args for request in requests])
            return [(-scored.nats, scored.is_greedy) for scored in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Of each text: its log-likelihood after an end of text."""
            with redirect_stderr(terminal or sys.stderr):
                return [-nats for nats in answers.rolling([request.args[0] for request in requests])]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The completion of each prompt, as its task wishes it."""
            with redirect_stderr(terminal or sys.stderr):
                return answers.completions(
                    [(prompt, _wish(own)) for prompt, own in (r.args for r in requests)]
                )

    return OvernightLM()


def _wish(asked: Mapping[str, Any]) -> GenerationRequest:
    """What a task's `generation_kwargs` ask for. Raises ValueError for what is not done here."""
    from lm_eval.models.utils import normalize_gen_kwargs

    wanted = dict(normalize_gen_kwargs(dict(asked), DEFAULT_NEW_TOKENS))
    strange = [f"{name}={value}" for name, value in wanted.items() if name not in WISHES]
    if wanted.get("num_beams", 1) != 1:
        strange.append(f"num_beams={wanted['num_beams']}")
    if strange:
        raise ValueError(
            f"a task of lm-eval asks for completions with {', '.join(strange)}, which is not done here"
        )
    sampling = SamplingConfig(temperature=0.0)
    if wanted["do_sample"]:
        sampling = SamplingConfig(
            temperature=float(wanted.get("temperature", 1.0)),
            top_k=wanted.get("top_k") or None,
            top_p=wanted.get("top_p"),
        )
    return GenerationRequest(
        wanted["max_gen_toks"], tuple(stop for stop in wanted["until"] if stop), sampling
    )


def _load(name: str, index: Any) -> dict[str, dict[str, Any]]:
    """The tasks and groups of a name, their data read."""
    try:
        found = index.load([name])
    except Exception as error:  # whatever a task's own code, its packages or the network come to
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"lm-eval's task {name} can't be made ready ({reason}): most tasks fetch their data from Hugging "
            "Face once, so run it where there is a network, or name with --task-files a folder with a YAML "
            "file of a task over local files"
        ) from None
    return {"tasks": found["tasks"], "groups": found["groups"]}


def _seed(tasks: Iterable[Any]) -> None:
    """What `simple_evaluate` does first: as many examples as each task says, and the harness's own seeds."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[HarnessScore]:
    """The harness's table: `metric,filter` -> value, and `metric_stderr,filter` -> its standard error."""
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            yield HarnessScore(
                task=task,
                metric=metric if chosen == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                samples=values["sample_len"],
            )


def _find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's TaskManager, which knows all of `names`; the errors of `check_harness`.

    To read all of its 14,000 files takes it ten seconds. To search them for single tasks, and to read no more
    than the folders that speak of them, takes two.
    """
    specification = importlib.util.find_spec("lm_eval")
    if specification is None or specification.origin is None:
        raise ValueError(
            "lm-evaluation-harness is not installed: pip install 'overnight[lm-eval]', or leave out the "
            "tasks that begin with lm-eval:"
        )
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}, in which to look for tasks of lm-eval")
    from lm_eval.tasks import TaskManager

    own = [] if folder is None else [folder]
    root = Path(specification.origin).parent / "tasks"
    spoken = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, names))})(?![\w.-])")
    found = {path for path in root.rglob("*.yaml") if spoken.search(path.read_text(encoding="utf-8"))}
    # Of two that define a name the first in alphabetical order counts, and here the last.
    folders = sorted({root / path.relative_to(root).parts[0] for path in found}, reverse=True)
    index = TaskManager(include_defaults=False, include_path=[*folders, *own])
    if not set(names) <= set(index.all_subtasks):  # groups and tags gather tasks from anywhere
        index = TaskManager(include_path=own)
    for name in names:
        if name not in index.task_index:
            near = difflib.get_close_matches(name, index.all_tasks, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists what there is"
            raise ValueError(f"lm-eval knows no task {name}; {remedy}")
    return index


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, nothing is shown, and warnings are not heard; afterwards all random numbers go on as before."""
    states = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


# ---------------------------------------------------------------- a model asked in text


TOKENS_AT_ONCE = 8192  # of prompts and completions together: their memory takes 600 MB of a GPT-2 124M
NOTHING = SpanResult(0.0, True)


@dataclass(frozen=True)
class GenerationRequest:
    """How a prompt is to be completed."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingConfig


@dataclass(frozen=True)
class EvalHarnessLM:
    """What a model with its tokenizer answers, in the order of the questions."""

    model: GPT
    tokenizer: Tokenizer
    precision: str

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[SpanResult]:
        """Of each (context, continuation) the continuation's nats, and whether greedy decoding writes it.

        The first tokens of a context that is too long are left out; an empty one is the end of text. Raises
        ValueError for a continuation that the model can't read at once.
        """
        context_length = self.model.config.context_length
        passages: list[Passage] = []
        for context, continuation in self._encode(pairs):
            if len(continuation) > context_length:
                raise ValueError(
                    f"a continuation of {len(continuation):,} tokens does not fit the model's context of "
                    f"{context_length:,}: leave this task out, or take a model with a longer context"
                )
            passages.append(Passage((context + continuation)[-context_length - 1 :], len(continuation)))
        return self._judge(passages)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The nats of each whole text after an end of text: in windows, each token judged once."""
        context_length = self.model.config.context_length
        windows = [
            list(cut_windows([self.tokenizer.end_of_text, *ids.tolist()], context_length))
            for ids in self.tokenizer.encode_batch(texts)
        ]
        judged = iter(self._judge(list(chain.from_iterable(windows))))
        return [sum(scored.nats for scored in islice(judged, len(each))) for each in windows]

    def completions(self, prompts: Sequence[tuple[str, GenerationRequest]]) -> list[str]:
        """What follows each prompt, up to its first stop string, the end of text or `max_new_tokens`.

        The first tokens of a prompt that leaves no room for so many are left out. Raises ValueError for a
        wish that leaves no room for any prompt.
        """
        found: dict[int, str] = {}
        ids = self.tokenizer.encode_batch([prompt for prompt, _ in prompts])
        with progress("completions", len(prompts), "texts") as advance:
            for wish in dict.fromkeys(wish for _, wish in prompts):
                room = self._room(wish)
                rows = {
                    place: ids[place].tolist()[-room:]
                    for place, (_, own) in enumerate(prompts)
                    if own == wish
                }
                for first_row, places in _batches(rows, wish.max_new_tokens):
                    texts = self._complete([rows[place] for place in places], wish, first_row)
                    found |= zip(places, texts, strict=True)
                    advance(len(places))
        return [found[place] for place in range(len(prompts))]

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
        """Each as ids. Blanks that end a context belong to the token that begins the continuation."""
        contexts = self.tokenizer.encode_batch([context.rstrip() for context, _ in pairs])
        wholes = self.tokenizer.encode_batch([context + continuation for context, continuation in pairs])
        for context, whole in zip(contexts, wholes, strict=True):
            yield context.tolist() or [self.tokenizer.end_of_text], whole[len(context) :].tolist()

    def _judge(self, passages: Sequence[Passage]) -> list[SpanResult]:
        """All of them, with a bar. A passage of which nothing is judged takes no nats."""
        found = [NOTHING] * len(passages)
        judged = [place for place, passage in enumerate(passages) if passage.scored]
        asked = [passages[place] for place in judged]
        with progress("likelihoods", len(asked), "rows") as advance:
            for place, scored in evaluate_passages(self.model, asked, self.precision):
                found[judged[place]] = scored
                advance()
        return found

    def _room(self, wish: GenerationRequest) -> int:
        """How many ids a prompt may have."""
        room = self.model.config.context_length - wish.max_new_tokens
        if room < 1:
            raise ValueError(
                f"a completion of {wish.max_new_tokens:,} tokens leaves no room for a prompt in the model's "
                f"context of {self.model.config.context_length:,}: leave this task out"
            )
        return room

    def _complete(self, rows: Sequence[list[int]], wish: GenerationRequest, first_row: int) -> list[str]:
        """The text that follows each row of ids, all written at once."""
        decoding = Decoding(
            max_new_tokens=wish.max_new_tokens,
            sampling=wish.sampling,
            end_of_text=self.tokenizer.end_of_text,
            vocab_size=self.tokenizer.vocab_size,
            first_row=first_row,
        )
        writers = [TextWriter(self.tokenizer, wish.stop) for _ in rows]
        texts = ["" for _ in rows]

        def ends(row: int, token: int) -> bool:
            texts[row] += writers[row].write(token)
            return writers[row].stopped

        with autocast(self.model.wte.weight.device.type, self.precision):
            for _ in stream_ids(self.model, rows, decoding, ends):
                pass
        return [text + writer.finish() for text, writer in zip(texts, writers, strict=True)]


def _batches(rows: Mapping[int, Sequence[int]], new: int) -> Iterator[tuple[int, list[int]]]:
    """Places of rows about as long, TOKENS_AT_ONCE together at most, and how many rows came before them."""
    order = sorted(rows, key=lambda place: (-len(rows[place]), place))
    first = 0
    while first < len(order):
        fitting = max(1, TOKENS_AT_ONCE // (len(rows[order[first]]) + new))
        yield first, order[first : first + fitting]
        first += fitting
