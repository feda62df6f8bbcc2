"""A run's folder: its lines, its lock, and what is refused before a run is resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile

import pytest

from overnight import files
from overnight.files import _temporary_cache, cache_path, write_atomically
from overnight.run_directory import RunDirectory


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_pipe_is_not_replaced_by_a_file(tmp_path):
    """Nor a device: root's `--out /dev/null` would take it from the whole machine."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="pipe is a device or a pipe"):
        write_atomically(path, "new")
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_read_in_order_and_numbers_that_are_not_finite_are_null(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    run = RunDirectory(tmp_path / "run")
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "loss": 2.5, "grad_norm": math.inf})
    run.append_metrics({"step": 2, "loss": math.nan, "grad_norm": -math.inf})
    run.append_event("samples", {"step": 2, "completion": "é\n<b>", "perplexity": math.inf})
    run.append_event("evaluations", {"step": 2, "by_source": [{"source": "a", "loss": math.nan}]})
    for path in (run.metrics, *(run.path / "events").iterdir()):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    lines = [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": None}]
    assert run.read_metrics() == lines
    assert run.read_events("samples") == [{"step": 2, "completion": "é\n<b>", "perplexity": None}]
    assert run.read_events("evaluations") == [{"step": 2, "by_source": [{"source": "a", "loss": None}]}]
    assert run.read_events("tasks") == []
    with pytest.raises(AssertionError, match="NaN is not JSON"):  # the control: what json writes by default
        json.loads(json.dumps({"loss": math.nan}), parse_constant=refuse)


def test_rewinding_drops_later_steps_and_makes_valid_json(tmp_path):
    run = RunDirectory(tmp_path)
    for step in range(1, 6):
        run.append_event("evaluations", {"step": step})
    run.metrics.write_text('{"step": 3, "loss": NaN}\n{"step": 4, "loss": 1.0}\n{"st')
    assert [line["step"] for line in run.read_metrics()] == [3, 4], "without the torn line"
    run.rewind(3)
    assert run.metrics.read_text() == '{"step": 3, "loss": null}\n'
    assert [line["step"] for line in run.read_events("evaluations")] == [1, 2, 3]


@pytest.mark.parametrize(("step", "is_noticed"), [(2, False), (3, True), (None, True)])
def test_line_after_the_recorded_step_may_be_torn(tmp_path, step, is_noticed):
    """A checkpoint is published while later steps are computed, whose lines may not be on the disk yet."""
    run = RunDirectory(tmp_path)
    run.begin("", {})
    for number in range(1, 4):
        run.append_metrics({"step": number})
    run.metrics.write_text(run.metrics.read_text() + '{"st')
    if step is None:  # the control: everything is recorded
        run.write(run.ended, {})
    else:
        run.flush(step)
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join([*lines[:2], lines[2][:5]]))
    assert bool(run.problems()) == is_noticed
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


HOLD_FOREVER = """
import signal, sys
from overnight.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    signal.pause()
"""


def test_run_has_one_owner_and_a_killed_owner_leaves_no_lock(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert not run.is_locked()
    words = [sys.executable, "-c", HOLD_FOREVER, str(run.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        assert run.is_locked()
        with pytest.raises(ValueError, match=str(run.path)), run.locked():
            pass
        owner.kill()
    assert not run.is_locked()


@pytest.fixture
def begun(tmp_path):
    """A run with a valid recipe and record."""
    run = RunDirectory(tmp_path / "run")
    run.begin("seed = 1\n[model]\nn_layer = 2\n", {"torch": "2"})
    write_atomically(run.data, "{}\n")
    run.append_metrics({"step": 1})
    return run


def test_truncated_recipe_is_refused(begun):
    written = begun.recipe.read_text()
    assert begun.read_recipe() == written
    for end in range(len(written)):
        begun.recipe.write_text(written[:end])
        with pytest.raises(ValueError, match=r"recipe\.toml (is damaged|has \d of 4 lines)"):
            begun.read_recipe()
    begun.recipe.write_text("seed = 1\n")  # of an earlier version, which did not count lines
    assert begun.read_recipe() == "seed = 1\n"
    begun.recipe.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"recipe\.toml is damaged"):
        begun.read_recipe()
    begun.recipe.unlink()
    assert begun.exists()
    with pytest.raises(ValueError, match=r"recipe\.toml is missing"):
        begun.read_recipe()


@pytest.mark.parametrize(
    "name, content, line",
    [
        *[("environment.json", content, "") for content in (None, b'{"torch"', b"[]")],
        ("data.json", b"\xff", ""),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', " line 2"),
        *[("metrics.jsonl", b'{"stop": 1}\n', " line 1"), ("metrics.jsonl", b"7\n", " line 1")],
        ("metrics.jsonl", b'{"step": 1, "a": "\xff"}\n', " line 1"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", " line 1"),
        ("metrics.jsonl", b'{"step": ' + b"9" * 5000 + b"}\n", " line 1"),
    ],
)
def test_damaged_record_is_named(begun, name, content, line):
    begun.check_record()
    (begun.path / name).unlink()
    if content is not None:
        (begun.path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name + line):
        begun.check_record()


def test_file_or_dangling_link_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    run = RunDirectory(tmp_path / "runs" / "small")
    with pytest.raises(ValueError, match="runs is not a folder"), run.locked():
        pass
    (tmp_path / "nowhere" / "small").mkdir(parents=True)
    run.checkpoints.symlink_to("a-disk-that-is-not-mounted")
    with pytest.raises(ValueError, match="checkpoints is not a folder"), run.locked():
        pass
    run.checkpoints.unlink()
    with run.locked():
        assert run.is_locked()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000003", "tokenizer"])
def test_permissions_are_checked_before_the_work(begun, monkeypatch, name):
    forbidden, access = begun.path / name, os.access
    forbidden.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != forbidden and access(path, mode))
    with pytest.raises(ValueError, match=f"{name} is not writable"), begun.locked():
        pass
    if name == "tokenizer":
        (begun.tokenizer / "tokenizer.json").touch()  # it exists, and is not written again
        with begun.locked():
            pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, another folder for temporary files, and no warning given yet."""
    _temporary_cache.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "variables, is_in_home",
    [
        ({}, True),
        ({"XDG_CACHE_HOME": ""}, True),
        ({"XDG_CACHE_HOME": "relative"}, True),
        ({"XDG_CACHE_HOME": "/dev/null"}, False),
        ({"HOME": "/dev/null/x"}, False),
        ({"HOME": "relative"}, False),
    ],
)
def test_cache_is_where_it_can_be_written(variables, is_in_home, home, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = [cache_path("tasks", "a.jsonl") for _ in range(2)]
    folder = home / ".cache/overnight" if is_in_home else home.parent / f"overnight-{os.getuid()}"
    assert found == [folder / "tasks/a.jsonl"] * 2
    assert capsys.readouterr().err.count("can't be written to") == (not is_in_home)  # once


def test_read_only_cache_is_read(home, monkeypatch):
    written = home / ".cache/overnight/gpt2/vocab.bpe"
    write_atomically(written, "kept")
    monkeypatch.setattr(files, "_can_be_written", lambda path: False)
    assert cache_path("gpt2", "vocab.bpe") == written
    assert cache_path("gpt2", "encoder.json").parts[:-2] != written.parts[:-2]
