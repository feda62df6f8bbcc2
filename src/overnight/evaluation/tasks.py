"""Tasks by name: multiple-choice questions, passages with a last word to predict, and texts.

The result of an example is a few numbers, so that it can be written to a file: an interrupted evaluation
continues.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from overnight import __version__
from overnight.config import nearest
from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.choice_tasks import (
    CHOICE_TASKS,
    ChoiceTask,
    Question,
    encode_question,
    read_questions,
)
from overnight.evaluation.multiple_choice import Choice, evaluate_choices
from overnight.evaluation.passages import Passage, cut_windows, evaluate_passages, gather_results
from overnight.evaluation.scores import Example, Numbers, Score, TaskResult, score_accuracy, score_text
from overnight.evaluation.text_tasks import TEXT_TASKS, EvaluationText, TextTask
from overnight.files import cache_path, write_atomically
from overnight.model.gpt import GPT
from overnight.terminal import echo, progress
from overnight.tokenizer.tokenizer import Tokenizer

EXAMPLE_CHARACTERS = 1000  # characters of a text that count as one example

VALIDATION = "validation"
HARNESS = "lm-eval:"
TASKS: tuple[str, ...] = (*CHOICE_TASKS, *TEXT_TASKS)


@dataclass(frozen=True)
class TaskNames:
    """The named tasks, by what evaluates them."""

    validation: bool
    own: tuple[str, ...]
    harness: tuple[str, ...]
    """Tasks of lm-evaluation-harness, by its names."""


def split_names(tasks: Sequence[str]) -> TaskNames:
    """Task names, separated by spaces or commas, without duplicates.

    Raises ValueError, with the nearest name, for an unknown one.
    """
    names = list(dict.fromkeys(name.strip() for word in tasks for name in word.split(",") if name.strip()))
    if not names:
        raise ValueError(f"name a task: {VALIDATION}, {', '.join(TASKS)}, {HARNESS}NAME")
    harness = tuple(name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS))
    own = tuple(name for name in names if not name.startswith(HARNESS))
    known = [VALIDATION, *TASKS]
    for name in own:
        if name not in known:
            raise ValueError(
                f"there is no task {name} among {', '.join(known)} and {HARNESS}NAME, those of "
                f"lm-evaluation-harness{nearest(name, known)}"
            )
    return TaskNames(VALIDATION in own, tuple(name for name in own if name != VALIDATION), harness)


@dataclass(frozen=True)
class Task:
    """A task whose file has been read."""

    row: ChoiceTask | TextTask
    content: Sequence[Question] | EvaluationText
    stride: int | None = None
    """New ids of each window of a text; a whole context if None."""

    @property
    def name(self) -> str:
        """One of TASKS."""
        return self.row.name

    def encode(self, tokenizer: Tokenizer, context_length: int) -> list[Example]:
        """The examples as ids. Raises ValueError for one that does not fit the context."""
        if isinstance(self.content, EvaluationText):
            ids = [tokenizer.end_of_text, *tokenizer.encode(self.content.text)]
            return [*cut_windows(ids, context_length, self.stride)]
        return [encode_question(each, tokenizer, context_length) for each in self.content]

    def score(self, results: Sequence[TaskResult]) -> list[Score]:
        """Every metric of the model's result, compared with the baseline's if there is a second one."""
        if isinstance(self.content, EvaluationText):
            losses = [each.text_loss(self.content.units()) for each in results]
            return score_text(self.name, self.row.metrics, losses)
        assert isinstance(self.row, ChoiceTask)
        kind, chance = f"{self.row.kind}s", self.row.chance
        scores = [score_accuracy(self.name, metric, kind, results, chance) for metric in self.row.metrics]
        if self.row.endings == 1:
            losses = [each.text_loss(None) for each in results]
            scores += score_text(self.name, ("perplexity_per_word",), losses, kind)
        return scores


def open_task(
    name: str, folder: str | Path | None, most: int | None = None, stride: int | None = None
) -> Task:
    """One of TASKS, its file read from `folder` or downloaded; its first `most` examples if given.

    For a text these are `most` thousand characters; `stride` is the number of new ids in each window of it.
    Raises ValueError for a missing, damaged or empty file.
    """
    row = CHOICE_TASKS.get(name) or TEXT_TASKS[name]
    path = find_file(row.file, row.url, folder)
    content: Sequence[Question] | EvaluationText
    if isinstance(row, TextTask):
        content = row.read(path, None if most is None else most * EXAMPLE_CHARACTERS)
        is_empty = not content.text.strip()
    else:
        content = list(read_questions(row, path))
        is_empty, content = not content, content[:most]
    if is_empty:
        raise ValueError(f"{path} is empty: download it again")
    return Task(row, content, stride)


def evaluate_task(
    model: GPT, examples: Sequence[Example], precision: str, world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, Numbers]]:
    """Yield (index, result) of a task's examples, in any order.

    The examples are divided among the processes of `world`, each of which yields its own.
    """
    choices = [example for example in examples if isinstance(example, Choice)]
    passages = [example for example in examples if isinstance(example, Passage)]
    assert not choices or not passages
    yield from evaluate_choices(model, choices, precision, world)
    yield from evaluate_passages(model, passages, precision, world)


def evaluate_cached(task: Task, model: GPT, tokenizer: Tokenizer, precision: str, world: World) -> TaskResult:
    """The model's results on every example, the same in all processes, with a progress bar.

    Each result is written to a file at once, so that an interrupted evaluation continues:

        task-results/<key>/<rank>.jsonl   a line per example: [index, result]

    The folder is deleted when all results are complete.
    """
    examples = task.encode(tokenizer, model.config.context_length)
    folder = cache_path("task-results", cache_key(model, examples, precision))
    known = _read_results(folder)
    world.barrier()  # all processes have read before one writes
    missing = [index for index in range(len(examples)) if index not in known]
    own = list(known.items()) if world.is_main else []
    with progress(task.name, len(examples), "examples") as advance:
        advance(len(known))
        rest = evaluate_task(model, [examples[index] for index in missing], precision, world)
        for done, (position, numbers) in enumerate(rest):
            own.append((missing[position], numbers))
            with suppress(OSError):  # a full disk must not end the evaluation
                folder.mkdir(parents=True, exist_ok=True)  # only now: invalid examples leave no folder behind
                with (folder / f"{world.rank}.jsonl").open("a") as file:
                    file.write("\n" + json.dumps(own[-1]))  # a new line, since the last may be incomplete
            # Other processes are assumed to be as fast; the last of them may have no example left.
            advance(min(world.size, max(0, len(missing) - world.size * done)))
    gathered = gather_results(own, world)
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return TaskResult(examples, gathered)


def cache_key(model: GPT, examples: Sequence[Example], precision: str) -> str:
    """A hash of all that decides the results: weights, examples, precision, device type, package version."""
    device = model.wte.weight.device.type
    digest = hashlib.sha256(json.dumps([__version__, precision, device, str(model.config)]).encode())
    for name, weight in sorted(model.weights().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().cpu().numpy().data)
    for example in examples:
        parts = (
            [example.context, *example.leads, *example.endings]
            if isinstance(example, Choice)
            else [example.ids, [example.scored]]
        )
        for part in parts:
            digest.update(np.asarray(part, dtype=np.int64).data)
            digest.update(b"|")
    return digest.hexdigest()


def _read_results(folder: Path) -> dict[int, Numbers]:
    """The results of earlier processes; incomplete lines are ignored."""
    found: dict[int, Numbers] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                index, numbers = json.loads(line)
                found[index] = tuple(numbers)
    return found


# ---------------------------------------------------------------- official files


TIMEOUT_SECONDS = 60.0


def find_file(name: str, url: str, folder: str | Path | None = None) -> Path:
    """The file `name` in `folder`, or without one downloaded from `url`, an archive or the file itself.

    `name` may contain folders of the archive. Raises ValueError, with what to download and where to put it,
    if there is no such file; and if a downloaded file has changed since.
    """
    if folder is not None:
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}: download {url} and put it there")
        return path
    path = cache_path("tasks", name)
    recorded = path.with_name(f"{path.name}.sha256")
    if not path.is_file():
        echo(f"downloading {url}")
        content = _download(name, url, path)
        write_atomically(recorded, _sha256(content) + "\n")
        write_atomically(path, content)
    elif recorded.is_file() and _sha256(path.read_bytes()) != recorded.read_text(encoding="ascii").strip():
        raise ValueError(f"{path} has changed since its download: delete it to download it again")
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(name: str, url: str, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
        return _extract(name, url, content)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, LookupError) as error:
        raise ValueError(
            f"{name} is not on this machine and cannot be downloaded ({error}): put it from {url} at "
            f"{path}, or name its folder with --task-files"
        ) from None


def _extract(name: str, url: str, content: bytes) -> bytes:
    """The file `name` of an archive; any other content unchanged."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(_member(name, archive.namelist()))
    if url.endswith((".tgz", ".tar.gz")):
        with tarfile.open(fileobj=io.BytesIO(content)) as folder:
            file = folder.extractfile(_member(name, folder.getnames()))
            if file is None:
                raise LookupError(f"{name} is not a file of the archive")
            return file.read()
    return content


def _member(name: str, members: Sequence[str]) -> str:
    found = [member for member in members if PurePosixPath(member).match(name)]
    if not found:
        raise LookupError(f"no {name} among the {len(members)} files of the archive")
    return found[0]
