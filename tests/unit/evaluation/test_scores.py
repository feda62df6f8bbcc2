"""Accuracies and losses by hand, and the paired comparison of two models."""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

from overnight.evaluation import tasks
from overnight.evaluation.multiple_choice import Choice, ChoiceResult
from overnight.evaluation.passages import SpanResult
from overnight.evaluation.perplexity import TextLoss
from overnight.evaluation.scores import (
    LossComparison,
    bootstrap,
    bootstrap_difference,
    compare_scores,
    mcnemar,
    score_choices,
    score_passages,
    score_text,
    wilson,
)
from overnight.evaluation.tasks import find_file

CHOICES = [Choice((1,), ((2,), (3, 4)), (4, 4), answer) for answer in (0, 1, 1, 1)]
NATS = [(1.0, 3.0), (2.0, 3.0), (5.0, 4.0), (1.0, 9.0)]


def test_each_accuracy_has_its_own_winners() -> None:
    judged = [ChoiceResult(nats, choice) for nats, choice in zip(NATS, CHOICES, strict=True)]
    found = {each.metric: each for each in score_choices("hellaswag", judged, 0.5)}
    assert found["accuracy_by_sum"].value == 0.5  # the first and the third
    assert found["accuracy_per_token"].value == 0.75  # the second as well: 2 nats against 1.5 a token
    assert found["accuracy_per_character"].value == 0.5
    assert found["accuracy_per_token"].interval == wilson(3, 4)
    assert [reference.value for reference in found["accuracy_per_token"].references] == [0.2955, 0.337, 0.956]
    assert found["accuracy_per_token"].against is None


def test_two_models_are_compared_on_the_questions_on_which_they_differ() -> None:
    found = compare_scores([True, True, False, True], [True, False, True, False])
    assert (found.value, found.only_here, found.only_there) == (0.5, 2, 1)
    assert found.probability == mcnemar(2, 1)


TEXT = TextLoss(nats=(3.0, 5.0, 4.0), tokens=(2, 3, 1), units={"word": 4, "byte": 24, "character": 20})


def test_a_loss_is_told_in_every_unit() -> None:
    metrics = ("nats_per_token", "perplexity_per_word", "bits_per_byte", "bits_per_character")
    found = {each.metric: each for each in score_text("wikitext-2", metrics, TEXT)}
    assert found["nats_per_token"].value == pytest.approx(2)
    assert found["perplexity_per_word"].value == pytest.approx(math.exp(3))
    assert found["bits_per_byte"].value == pytest.approx(0.5 / math.log(2))
    assert found["bits_per_character"].value == pytest.approx(0.6 / math.log(2))
    interval = bootstrap(TEXT.nats, TEXT.tokens)
    assert found["perplexity_per_word"].interval.low == pytest.approx(math.exp(interval.low * 6 / 4))
    assert found["bits_per_byte"].interval.high == pytest.approx(interval.high * 6 / 24 / math.log(2))
    assert [each.value for each in found["perplexity_per_word"].references] == [29.41, 22.76, 19.93, 18.34]


def test_two_models_are_compared_on_the_same_windows_only() -> None:
    worse = dataclasses.replace(TEXT, nats=(3.1, 5.3, 4.2))
    (found,) = score_text("ptb", ("nats_per_token",), TEXT, worse)
    assert isinstance(found.against, LossComparison)
    assert found.against.value == pytest.approx(2.1)
    assert found.against.difference == bootstrap_difference(TEXT.nats, worse.nats, TEXT.tokens)
    assert found.against.difference is not None
    assert found.against.difference.high < 0, "worse everywhere"
    elsewhere = dataclasses.replace(worse, tokens=(2, 2, 2))
    (found,) = score_text("ptb", ("nats_per_token",), TEXT, elsewhere)
    assert isinstance(found.against, LossComparison)
    assert found.against.difference is None


def test_a_last_word_is_right_if_every_id_of_it_is() -> None:
    scored = [SpanResult(1.0, True), SpanResult(4.0, False), SpanResult(1.0, True), SpanResult(2.0, True)]
    words = TextLoss(nats=(1.0, 4.0, 1.0, 2.0), tokens=(1, 1, 1, 1), units={"word": 4})
    accuracy, perplexity = score_passages("lambada", scored, words, None)
    assert (accuracy.metric, accuracy.value, accuracy.interval) == ("accuracy", 0.75, wilson(3, 4))
    assert (perplexity.metric, perplexity.value) == ("perplexity_per_word", pytest.approx(math.exp(2)))
    assert perplexity.references[0].value == 35.13


def test_a_hopeless_loss_is_an_infinite_perplexity() -> None:
    hopeless = TextLoss(nats=(900.0,), tokens=(1,), units={})
    (found,) = score_text("validation", ("perplexity_per_token",), hopeless)
    assert found.value == math.inf


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A publisher's file and a zip of it, read by the real code over file:// addresses."""
    monkeypatch.setattr(tasks, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "plain.jsonl").write_text("one\n")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside/packed.jsonl", "two\n")
    (folder / "archive.zip").write_bytes(packed.getvalue())
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "same.txt").write_text(f"{name}\n")
    with tarfile.open(folder / "archive.tgz", "w:gz") as archive:
        archive.add(folder / "a", "books/a")
        archive.add(folder / "b", "books/b")
    return folder


def test_a_file_is_fetched_once_and_checked_from_then_on(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = published.as_uri()
    path = find_file("plain.jsonl", f"{address}/plain.jsonl")
    assert path.read_text() == "one\n"
    assert find_file("packed.jsonl", f"{address}/archive.zip").read_text() == "two\n"
    assert find_file("b/same.txt", f"{address}/archive.tgz").read_text() == "b\n"
    assert find_file("a/same.txt", f"{address}/archive.tgz").read_text() == "a\n"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("fetched again"))
    assert find_file("plain.jsonl", f"{address}/plain.jsonl") == path
    path.write_text("another\n")
    with pytest.raises(ValueError, match="is not as it was fetched: delete it"):
        find_file("plain.jsonl", f"{address}/plain.jsonl")
    path.with_name("packed.jsonl").write_text("damaged\n")
    with pytest.raises(ValueError, match="fetched again"):
        find_file("packed.jsonl", f"{address}/archive.zip")


def test_what_is_not_there_is_told_with_its_address(published: Path, tmp_path: Path) -> None:
    address = published.as_uri()
    with pytest.raises(ValueError, match=r"task\.jsonl is not on this machine .* or name the folder"):
        find_file("task.jsonl", f"{address}/task.jsonl")
    with pytest.raises(ValueError, match=r"has no task\.jsonl: fetch "):
        find_file("task.jsonl", f"{address}/task.jsonl", tmp_path)
    with pytest.raises(ValueError, match="can't be fetched"):
        find_file("missing.jsonl", f"{address}/archive.zip")
    for lacking in ("c/same.txt", "books/a"):
        with pytest.raises(ValueError, match="can't be fetched"):
            find_file(lacking, f"{address}/archive.tgz")
    assert find_file("plain.jsonl", "", published) == published / "plain.jsonl"
