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
