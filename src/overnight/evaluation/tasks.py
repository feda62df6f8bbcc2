"""Every task by its name, opened the same way: questions, passages or a text, ready for any model.

What a model makes of an example is a few numbers, so that it can be written down and read again.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from overnight.distributed.world import SINGLE_PROCESS, World
from overnight.evaluation.choice_tasks import CHOICE_TASKS, encode_question, read_questions
from overnight.evaluation.multiple_choice import Choice, ChoiceResult, evaluate_choices
from overnight.evaluation.passages import Passage, SpanResult, evaluate_passages
from overnight.evaluation.perplexity import TextLoss
from overnight.evaluation.scores import Score, score_choices, score_passages, score_text
from overnight.evaluation.text_tasks import CLOZE_TASKS, TEXT_TASKS, EvaluationText, encode_cloze, encode_text
from overnight.model.gpt import GPT
from overnight.run_directory import cache_folder, write_atomically
from overnight.terminal import echo
from overnight.tokenizer.tokenizer import Tokenizer

Example = Choice | Passage
Numbers = tuple[float, ...]
"""What a model makes of an example: the nats of each ending; or a passage's nats, and 1 if it is greedy."""
Item = TypeVar("Item")
CHARACTERS = 1000  # of a text, that count as an example where only some are asked for

TASKS: tuple[str, ...] = (*CHOICE_TASKS, *CLOZE_TASKS, *TEXT_TASKS)


@dataclass(frozen=True)
class TaskResult:
    """What one model makes of all examples of a task, in their order."""

    examples: Sequence[Example]
    numbers: Sequence[Numbers]


@dataclass(frozen=True)
class Task:
    """A task whose file has been read."""

    name: str
    encode: Callable[[Tokenizer, int], Sequence[Example]]
    """(tokenizer, context length) -> its examples as ids. Raises ValueError for one that can't be read so."""
    score: Callable[[TaskResult, TaskResult | None], list[Score]]
    """A model's results, beside another model's if there is one."""


def open_task(name: str, folder: Path | None, most: int | None = None, stride: int | None = None) -> Task:
    """One of TASKS, its file found in `folder` or fetched; with `most`, the first so many examples of it.

    Of a text that is the first so many thousand characters. `stride` is for texts, too: how many new ids a
    window judges. Raises ValueError for a file that is not there,
    damaged, or empty.
    """
    if name in CHOICE_TASKS:
        choice_task = CHOICE_TASKS[name]
        path = find_file(choice_task.file, choice_task.url, folder)
        questions = _at_most(most, list(read_questions(choice_task, path)), path)
        return Task(
            name,
            lambda tokenizer, _: [encode_question(question, tokenizer) for question in questions],
            partial(_score_choices, name),
        )
    if name in CLOZE_TASKS:
        cloze_task = CLOZE_TASKS[name]
        path = find_file(cloze_task.file, cloze_task.url, folder)
        clozes = _at_most(most, cloze_task.read(path), path)
        return Task(
            name,
            lambda tokenizer, length: [encode_cloze(cloze, tokenizer, length) for cloze in clozes],
            partial(_score_clozes, name),
        )
    text_task = TEXT_TASKS[name]
    path = find_file(text_task.file, text_task.url, folder)
    text = text_task.read(path, None if most is None else most * CHARACTERS)
    if not text.text.strip():
        raise ValueError(f"{path} is empty: fetch it again")
    return Task(
        name,
        lambda tokenizer, length: encode_text(text.text, tokenizer, length, stride),
        partial(_score_text, name, text),
    )


def evaluate_task(
    model: GPT, examples: Sequence[Example], precision: str, world: World = SINGLE_PROCESS
) -> Iterator[tuple[int, Numbers]]:
    """The place of each of a task's examples, and what the model makes of it, in any order.

    The examples are divided among the processes of `world`, each of which yields its own.
    """
    choices = [example for example in examples if isinstance(example, Choice)]
    passages = [example for example in examples if isinstance(example, Passage)]
    assert not choices or not passages
    for place, judged in evaluate_choices(model, choices, precision, world):
        yield place, judged.nats
    for place, scored in evaluate_passages(model, passages, precision, world):
        yield place, (scored.nats, float(scored.is_greedy))


def _at_most(most: int | None, items: list[Item], path: Path) -> list[Item]:
    if not items:
        raise ValueError(f"{path} is empty: fetch it again")
    return items[:most]


def _score_choices(name: str, here: TaskResult, there: TaskResult | None) -> list[Score]:
    task = CHOICE_TASKS[name]
    against = None if there is None else _as_judged(there)
    return score_choices(name, _as_judged(here), task.chance, against, task.metrics)


def _score_clozes(name: str, here: TaskResult, there: TaskResult | None) -> list[Score]:
    against = None if there is None else (_as_scored(there), _measure_words(there))
    return score_passages(name, _as_scored(here), _measure_words(here), against)


def _score_text(name: str, text: EvaluationText, here: TaskResult, there: TaskResult | None) -> list[Score]:
    against = None if there is None else _measure_text(text, there)
    return score_text(name, TEXT_TASKS[name].metrics, _measure_text(text, here), against)


def _as_judged(side: TaskResult) -> list[ChoiceResult]:
    pairs = zip(side.numbers, side.examples, strict=True)
    return [ChoiceResult(nats, choice) for nats, choice in pairs if isinstance(choice, Choice)]


def _as_scored(side: TaskResult) -> list[SpanResult]:
    return [SpanResult(nats, bool(is_greedy)) for nats, is_greedy in side.numbers]


def _measure_words(side: TaskResult) -> TextLoss:
    """Each passage's last word is one word, however many ids it has."""
    nats = tuple(numbers[0] for numbers in side.numbers)
    return TextLoss(nats=nats, tokens=(1,) * len(nats), units={"word": len(nats)})


def _measure_text(text: EvaluationText, side: TaskResult) -> TextLoss:
    tokens = tuple(passage.scored for passage in side.examples if isinstance(passage, Passage))
    return TextLoss(nats=tuple(numbers[0] for numbers in side.numbers), tokens=tokens, units=text.units())


# ---------------------------------------------------------------- where the official files of tasks lie


TIMEOUT_SECONDS = 60.0


def find_file(name: str, url: str, folder: Path | None = None) -> Path:
    """The file of that name, in `folder` if one is given, or fetched from `url`, be it packed there or not.

    A name may hold the folders that the file lies in where it is packed. Raises ValueError, with what to
    fetch and where to put it, if there is no such file and it can't be fetched; and if one that was fetched
    is not as it was any more.
    """
    if folder is not None:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: fetch {url} and put that there")
        return folder / name
    path = cache_folder() / "tasks" / name
    recorded = path.with_name(f"{path.name}.sha256")
    if not path.is_file():
        echo(f"fetching {url}, once")
        content = _fetch(name, url, path)
        write_atomically(recorded, hashlib.sha256(content).hexdigest() + "\n")
        write_atomically(path, content)
    elif recorded.is_file() and _digest(path) != recorded.read_text(encoding="ascii").strip():
        raise ValueError(f"{path} is not as it was fetched: delete it, and it is fetched again")
    return path


def _fetch(name: str, url: str, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
        return _unpack(name, url, content)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, LookupError) as error:
        raise ValueError(
            f"{name} is not on this machine and can't be fetched ({error}): fetch {url} elsewhere and put it "
            f"at {path}, or name the folder it lies in with --task-files"
        ) from None


def _unpack(name: str, url: str, content: bytes) -> bytes:
    """What lies under this name in a packed file; any other file as it is."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            return packed.read(_find_inside(name, packed.namelist()))
    if url.endswith((".tgz", ".tar.gz")):
        with tarfile.open(fileobj=io.BytesIO(content)) as folder:
            file = folder.extractfile(_find_inside(name, folder.getnames()))
            if file is None:
                raise LookupError(f"{name} is no file there")
            return file.read()
    return content


def _find_inside(name: str, names: Sequence[str]) -> str:
    wanted = PurePosixPath(name).parts
    for each in names:
        if PurePosixPath(each).parts[-len(wanted) :] == wanted:
            return each
    raise LookupError(f"no {name} among its {len(names)} files")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
