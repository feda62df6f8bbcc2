from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from overnight.run_directory import RunDirectory, write_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.read_metrics() == []
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": 1 / step})
        run.append_event("samples", {"step": step, "completion": "é\n<b>"})
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
    assert run.read_events("samples")[0]["completion"] == "é\n<b>"
    assert run.read_events("evaluations") == []


def test_a_number_that_is_not_finite_is_null_so_that_the_file_is_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1, "loss": 2.5, "grad_norm": math.inf})
    run.append_metrics({"step": 2, "loss": math.nan, "grad_norm": -math.inf})
    run.append_event("evaluations", {"step": 2, "loss": math.nan, "perplexity": math.inf})
    for path in (run.metrics, tmp_path / "events" / "evaluations.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert run.read_metrics() == [
        {"step": 1, "loss": 2.5, "grad_norm": None},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    with pytest.raises(AssertionError, match="NaN is not JSON"):  # what json writes of itself
        json.loads(json.dumps({"loss": math.nan}), parse_constant=refuse)


def test_where_no_null_can_stand_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1, "losses": [1.0]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_metrics({"step": 2, "losses": [math.nan]})
    assert [line["step"] for line in run.read_metrics()] == [1]


def test_rewinding_makes_json_of_lines_that_were_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n')
    run.rewind(1)
    assert run.metrics.read_text() == '{"step": 1, "loss": null}\n'


def test_rewinding_drops_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.append_metrics({"step": step})
        run.append_event("evaluations", {"step": step})
    run.rewind(3)
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
    assert [line["step"] for line in run.read_events("evaluations")] == [1, 2, 3]


def test_a_torn_last_line_is_left_out_and_other_damage_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
    run.rewind(2)
    run.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]
    run.metrics.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is damaged"):
        run.read_metrics()


HOLD_FOREVER = """
import signal, sys
from overnight.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    signal.pause()
"""


def test_one_run_has_one_owner_and_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not run.is_locked()
    words = [sys.executable, "-c", HOLD_FOREVER, str(run.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        assert run.is_locked()
        with pytest.raises(ValueError, match="another process"), run.locked():
            pass
        owner.kill()
    assert not run.is_locked()


# ---------------------------------------------------------------- what a run needs to go on


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    """A run whose recipe and record are whole."""
    run = RunDirectory(tmp_path / "run")
    run.begin("seed = 1\n[model]\nn_layer = 2\n", {"torch": "2"})
    write_atomically(run.data, "{}\n")
    run.append_metrics({"step": 1})
    return run


def test_a_recipe_that_lost_lines_is_not_taken_for_a_short_one(begun: RunDirectory) -> None:
    written = begun.recipe.read_text()
    assert begun.read_recipe() == written
    for end in range(written.index("\n") + 1, len(written)):
        begun.recipe.write_text(written[:end])
        with pytest.raises(ValueError, match=r"recipe.toml has \d lines of 4: take it from"):
            begun.read_recipe()
    begun.recipe.write_text("seed = 1\n")  # of an earlier version, which did not count
    assert begun.read_recipe() == "seed = 1\n"
    begun.recipe.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"recipe.toml is damaged: take it from a copy"):
        begun.read_recipe()


def test_a_run_that_has_lost_its_recipe_is_there_still(begun: RunDirectory) -> None:
    begun.recipe.unlink()
    assert begun.exists()
    with pytest.raises(ValueError, match=r"recipe.toml is missing: take it from a copy"):
        begun.read_recipe()


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("environment.json", None, r"environment.json is missing"),
        ("environment.json", b'{"torch"', r"environment.json is damaged"),
        ("environment.json", b"[]", r"environment.json is damaged"),
        ("data.json", b"\xff", r"data.json is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', r"metrics.jsonl line 2 is damaged"),
        ("metrics.jsonl", b'{"stop": 1}\n', r"metrics.jsonl line 1 is damaged"),
        ("metrics.jsonl", b'{"step": 1, "a": "\xff"}\n', r"metrics.jsonl line 1 is damaged"),
        ("metrics.jsonl", b"7\n", r"metrics.jsonl line 1 is damaged"),
    ],
)
def test_what_a_run_needs_to_go_on_is_named(
    begun: RunDirectory, name: str, content: bytes | None, complaint: str
) -> None:
    begun.check_record()
    if content is None:
        (begun.path / name).unlink()
    else:
        (begun.path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{complaint}.* take it from a copy"):
        begun.check_record()


def test_a_file_or_an_empty_link_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("nowhere")
    run = RunDirectory(tmp_path / "runs" / "small")
    with pytest.raises(ValueError, match=r"runs is no folder, and must be one: move it away"), run.locked():
        pass
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "small").mkdir()
    run.checkpoints.symlink_to("a-disk-that-is-not-mounted")
    with pytest.raises(ValueError, match=r"checkpoints is no folder, .* what it leads to"), run.locked():
        pass
    run.checkpoints.unlink()
    with run.locked():
        assert run.is_locked()


def test_rights_are_asked_for_before_the_work(begun: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.checkpoints.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != begun.checkpoints and access(path, mode))
    with pytest.raises(ValueError, match=r"checkpoints may not be written by this user"), begun.locked():
        pass
    (old := begun.checkpoints / "step-00000003").mkdir()  # which is deleted in time
    monkeypatch.setattr(os, "access", lambda path, mode: path != old and access(path, mode))
    with pytest.raises(ValueError, match=r"step-00000003 may not be written by this user"), begun.locked():
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: path != begun.tokenizer and access(path, mode))
    begun.tokenizer.mkdir()
    with pytest.raises(ValueError, match=r"tokenizer may not be written by this user"), begun.locked():
        pass
    (begun.tokenizer / "tokenizer.json").touch()  # it is there, and not written again
    with begun.locked():
        pass


@pytest.mark.parametrize("left", ["", "\n", "# These", "# These are 4"])
def test_a_recipe_of_which_less_than_its_first_line_is_left_is_damaged(
    begun: RunDirectory, left: str
) -> None:
    begun.recipe.write_text(left)
    with pytest.raises(ValueError, match=r"recipe.toml is damaged: take it from a copy"):
        begun.read_recipe()
