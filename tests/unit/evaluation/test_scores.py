"""Scores by hand; intervals against closed forms and simulation; downloads of task files."""

from __future__ import annotations

import json
import math
import tarfile
import urllib.request
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from overnight.evaluation import scores
from overnight.evaluation import tasks as downloads
from overnight.evaluation.multiple_choice import Choice
from overnight.evaluation.passages import Passage
from overnight.evaluation.perplexity import TextLoss
from overnight.evaluation.scores import (
    AccuracyComparison,
    LossComparison,
    TaskResult,
    bootstrap,
    mcnemar,
    score_text,
    wilson,
)
from overnight.evaluation.tasks import Task, find_file, open_task

CHOICES = [Choice((1,), ((2,), (3, 4)), (4, 4), answer) for answer in (0, 1, 1, 1)]
NATS = [(1.0, 3.0), (2.0, 3.0), (5.0, 4.0), (1.0, 9.0)]
TIMES = 10  # repeated, for an interval
TEXT = TextLoss(
    nats=(3.0, 5.0, 4.0) * TIMES,
    tokens=(2, 3, 1) * TIMES,
    units={"word": 4 * TIMES, "byte": 24 * TIMES, "character": 20 * TIMES},
)


def open_choices(tmp_path: Path) -> Task:
    line = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(line))
    return open_task("hellaswag", tmp_path)


def test_score_choices_by_hand(tmp_path: Path) -> None:
    task, result = open_choices(tmp_path), TaskResult(CHOICES, NATS)
    found = {each.metric: each for each in task.score([result])}
    assert found["accuracy_by_sum"].value == 0.5  # the first and the third
    assert found["accuracy_per_token"].value == 0.75  # also the second: 1.5 nats per token against 2
    assert found["accuracy_per_character"].value == 0.5
    assert found["accuracy_per_token"].interval == wilson(3, 4)
    assert [reference.value for reference in found["accuracy_per_token"].references] == [0.2955, 0.337, 0.956]
    assert found["accuracy_per_token"].against is None
    # A baseline's endings have the lengths of its own tokenizer.
    longer = TaskResult([replace(each, endings=((2, 2, 2), (3,))) for each in CHOICES], NATS)
    against = task.score([result, longer])[0].against
    assert against == AccuracyComparison(0.25, only_here=2, only_there=0, probability=mcnemar(2, 0))


def test_score_text_in_every_unit() -> None:
    metrics = ("nats_per_token", "perplexity_per_word", "bits_per_byte", "bits_per_character")
    found = {each.metric: each for each in score_text("wikitext-2", metrics, [TEXT])}
    wanted = (2, math.exp(3), 0.5 / math.log(2), 0.6 / math.log(2))
    assert [found[metric].value for metric in metrics] == pytest.approx(wanted)
    interval = bootstrap(TEXT.nats, TEXT.tokens)
    assert interval is not None
    assert found["perplexity_per_word"].interval.low == pytest.approx(math.exp(interval.low * 6 / 4))
    assert found["bits_per_byte"].interval.high == pytest.approx(interval.high * 6 / 24 / math.log(2))
    assert [each.value for each in found["perplexity_per_word"].references] == [29.41, 22.76, 19.93, 18.34]
    large = TextLoss(nats=(900.0,), tokens=(1,), units={})
    assert score_text("validation", ("perplexity_per_token",), [large])[0].value == math.inf


def test_text_losses_are_compared_on_same_windows_only() -> None:
    worse = replace(TEXT, nats=(3.1, 5.3, 4.2) * TIMES)
    (found,) = score_text("ptb", ("nats_per_token",), [TEXT, worse])
    assert isinstance(found.against, LossComparison)
    assert found.against.value == pytest.approx(2.1)
    assert found.against.difference is not None
    assert found.against.difference.high < 0, "worse everywhere"
    (found,) = score_text("ptb", ("nats_per_token",), [TEXT, replace(worse, tokens=(2, 2, 2) * TIMES)])
    assert isinstance(found.against, LossComparison)
    assert found.against.difference is None


def test_score_passages_by_hand(tmp_path: Path) -> None:
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "a b"}')
    numbers = [(1.0, 1.0), (4.0, 0.0), (1.0, 1.0), (2.0, 1.0)]
    result = TaskResult([Passage([1, 2], 1)] * 4, numbers)
    accuracy, perplexity = open_task("lambada", tmp_path).score([result])
    assert (accuracy.metric, accuracy.value, accuracy.interval) == ("accuracy", 0.75, wilson(3, 4))
    assert (perplexity.metric, perplexity.value) == ("perplexity_per_word", pytest.approx(math.exp(2)))
    assert perplexity.references[0].value == 35.13


def test_wilson_solves_its_equation() -> None:
    """Its ends are the proportions that are 1.96 standard errors away from the observed one."""
    for correct, count in ((0, 10), (3, 10), (2967, 10_042), (10, 10)):
        found = wilson(correct, count)
        for end in (found.low, found.high):
            error = math.sqrt(end * (1 - end) / count)
            off = abs(correct / count - end)
            assert off == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-7) or off == 0


def test_bootstrap_covers_the_mean_and_needs_enough_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of skewed examples. The negative control: two examples cover it half the time."""
    monkeypatch.setattr(scores, "RESAMPLES", 400)
    random, covered = np.random.default_rng(0), {}
    for count in (scores.LEAST_EXAMPLES, 2):
        assert bootstrap([1.0] * (count - 1), [1.0] * (count - 1)) is None
        monkeypatch.setattr(scores, "LEAST_EXAMPLES", count)
        drawn = random.gamma(9.0, 1 / 9, (400, count)).tolist()
        found = [bootstrap(values, [1.0] * count) for values in drawn]
        covered[count] = np.mean([each is not None and each.low < 1 < each.high for each in found])
    assert covered[20] >= 0.9
    assert covered[2] < 0.6


def test_bootstrap_of_mean_matches_standard_error() -> None:
    values = np.random.default_rng(2).exponential(2.0, 3000)
    found = bootstrap(values.tolist(), [1.0] * len(values))
    error = values.std() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < values.mean() < found.high
    assert bootstrap(values.tolist(), [1.0] * len(values)) == found, "deterministic"
    ratio = bootstrap([10.0, 0.0] * 500, [1.0, 9.0] * 500)
    assert ratio.low < 1.0 < ratio.high, "examples are weighted by their counts"


def test_paired_bootstrap_finds_small_difference() -> None:
    random = np.random.default_rng(3)
    difficulty = random.normal(3.0, 1.0, 2000)
    first, second = (difficulty + 0.02).tolist(), (difficulty + random.normal(0, 0.05, 2000)).tolist()
    ones = [1.0] * 2000
    assert bootstrap(first, ones).low < bootstrap(second, ones).high, "the intervals overlap"
    assert bootstrap(np.subtract(first, second).tolist(), ones).low > 0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 9), (40, 60), (500, 700)])
def test_mcnemar_is_binomial_tail(first: int, second: int) -> None:
    count = first + second
    tail = sum(Fraction(math.comb(count, k), 2**count) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files and archives with file:// addresses, and an empty cache."""
    monkeypatch.setattr(downloads, "cache_path", (tmp_path / "cache").joinpath)
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "plain.jsonl").write_text("one\n")
    with zipfile.ZipFile(folder / "archive.zip", "w") as zipped:
        zipped.writestr("inside/packed.jsonl", "two\n")
    with tarfile.open(folder / "archive.tgz", "w:gz") as archive:
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "same.txt").write_text(f"{name}\n")
            archive.add(folder / name, f"books/{name}")
    return folder


def test_task_file_is_downloaded_once_and_verified(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = published.as_uri()
    path = find_file("plain.jsonl", f"{address}/plain.jsonl")
    assert path.read_text() == "one\n"
    assert find_file("packed.jsonl", f"{address}/archive.zip").read_text() == "two\n"
    assert find_file("b/same.txt", f"{address}/archive.tgz").read_text() == "b\n"
    assert find_file("a/same.txt", f"{address}/archive.tgz").read_text() == "a\n"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloaded again"))
    assert find_file("plain.jsonl", f"{address}/plain.jsonl") == path
    for name in ("plain.jsonl", "packed.jsonl"):
        path.with_name(name).write_text("damaged\n")
        with pytest.raises(ValueError, match=name):
            find_file(name, f"{address}/{name}")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("task.jsonl", "task.jsonl"),
        ("missing.jsonl", "archive.zip"),
        ("c/same.txt", "archive.tgz"),
        ("books/a", "archive.tgz"),
    ],
)
def test_missing_task_file_is_refused(published: Path, tmp_path: Path, name: str, source: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{source}.*--task-files"):
        find_file(name, f"{published.as_uri()}/{source}")
    with pytest.raises(ValueError, match=f"{name}: .*{source}"):
        find_file(name, f"{published.as_uri()}/{source}", tmp_path)
    assert find_file("plain.jsonl", "", published) == published / "plain.jsonl"
