"""Accuracies by hand, and the paired comparison of two models."""

from __future__ import annotations

import io
import urllib.request
import zipfile
from pathlib import Path

import pytest

from overnight.evaluation import files as files_room
from overnight.evaluation.choices import Choice, Judged
from overnight.evaluation.files import find_file
from overnight.evaluation.intervals import mcnemar, wilson
from overnight.evaluation.multiple_choice import compare, sum_up

CHOICES = [Choice((1,), ((2,), (3, 4)), (4, 4), answer) for answer in (0, 1, 1, 1)]
NATS = [(1.0, 3.0), (2.0, 3.0), (5.0, 4.0), (1.0, 9.0)]


def test_each_accuracy_has_its_own_winners() -> None:
    judged = [Judged(nats, choice) for nats, choice in zip(NATS, CHOICES, strict=True)]
    found = {each.metric: each for each in sum_up("hellaswag", judged, 0.5)}
    assert found["accuracy_by_sum"].right == 2  # the first and the third
    assert found["accuracy_per_token"].right == 3  # the second as well: 2 nats against 1.5 a token
    assert found["accuracy_per_character"].right == 2
    assert found["accuracy_per_token"].value == 0.75
    assert found["accuracy_per_token"].interval == wilson(3, 4)
    assert [reference.value for reference in found["accuracy_per_token"].references] == [0.2955, 0.337, 0.956]
    assert found["accuracy_per_token"].against is None


def test_two_models_are_compared_on_the_questions_on_which_they_differ() -> None:
    found = compare([True, True, False, True], [True, False, True, False])
    assert (found.right, found.only_here, found.only_there) == (2, 2, 1)
    assert found.probability == mcnemar(2, 1)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A publisher's file and a zip of it, read by the real code over file:// addresses."""
    monkeypatch.setattr(files_room, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "plain.jsonl").write_text("one\n")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside/packed.jsonl", "two\n")
    (folder / "archive.zip").write_bytes(packed.getvalue())
    return folder


def test_a_file_is_fetched_once_and_checked_from_then_on(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = published.as_uri()
    path = find_file("plain.jsonl", f"{address}/plain.jsonl")
    assert path.read_text() == "one\n"
    assert find_file("packed.jsonl", f"{address}/archive.zip").read_text() == "two\n"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("fetched again"))
    assert find_file("plain.jsonl", f"{address}/plain.jsonl") == path
    path.write_text("another\n")
    with pytest.raises(ValueError, match="is not as it was fetched: delete it"):
        find_file("plain.jsonl", f"{address}/plain.jsonl")


def test_what_is_not_there_is_told_with_its_address(published: Path, tmp_path: Path) -> None:
    address = published.as_uri()
    with pytest.raises(ValueError, match=r"task\.jsonl is not on this machine .* or name the folder"):
        find_file("task.jsonl", f"{address}/task.jsonl")
    with pytest.raises(ValueError, match=r"has no task\.jsonl: fetch "):
        find_file("task.jsonl", f"{address}/task.jsonl", tmp_path)
    with pytest.raises(ValueError, match="can't be fetched"):
        find_file("missing.jsonl", f"{address}/archive.zip")
    assert find_file("plain.jsonl", "", published) == published / "plain.jsonl"
