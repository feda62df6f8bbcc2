"""Each tracker's own file is read back; nothing is sent anywhere."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overnight.trackers import TRACKERS, find_problems, open_trackers


def read_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Curve -> step -> value, as TensorBoard itself shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_of_a_resumed_run_has_each_step_once_and_no_value_that_is_not_finite(
    tmp_path: Path,
) -> None:
    norms = {1: 2.0, 2: float("nan"), 3: float("inf"), 4: 1.0, 5: 1.5}
    for first, loss in [(1, 5.0), (3, 4.0)]:
        with open_trackers(["tensorboard"], tmp_path, "a run", {"seed": 1337}) as log:
            for step in range(first, first + 3):
                log(step, {"loss": loss, "grad_norm": norms[step]})
    curves = read_tensorboard(tmp_path / "tensorboard")
    assert curves["loss"] == {1: 5.0, 2: 5.0, 3: 4.0, 4: 4.0, 5: 4.0}
    assert curves["grad_norm"] == {1: 2.0, 4: 1.0, 5: 1.5}


LOG_TWO_STEPS = """
import sys
from pathlib import Path
from overnight.trackers import open_trackers

with open_trackers([sys.argv[1]], Path(sys.argv[2]), "a run", {"seed": 1337}) as log:
    log(1, {"loss": 10.825})
    log(2, {"loss": 9.5})
"""


def log_two_steps(tracker: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a tracker in a process with its own home: it starts services and keeps caches."""
    home = {"HOME": str(folder / "home"), "TRACKIO_DIR": str(folder / "trackio"), "PATH": os.defpath}
    (folder / "home").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", LOG_TWO_STEPS, tracker, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )


def read_wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a log below 32 KiB: a 7-byte head, then checksum, length, kind and content of each."""
    content = path.read_bytes()
    assert len(content) < 32768
    position = 7
    while position < len(content):
        _, length, _ = struct.unpack_from("<IHB", content, position)
        yield content[position + 7 : position + 7 + length]
        position += 7 + length


def test_wandb_without_login_logs_offline_under_one_id(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    process = log_two_steps("wandb", tmp_path)
    assert process.stdout == ""
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = [Record.FromString(content) for content in read_wandb_records(path)]
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    losses = {
        row.step.num: json.loads(item.value_json)
        for row in rows
        for item in row.item
        if "loss" in (item.key, *item.nested_key)
    }
    assert losses == {1: 10.825, 2: 9.5}
    run_id = (tmp_path / "wandb-id").read_text()
    assert run_id in path.name
    log_two_steps("wandb", tmp_path)  # the same run, resumed
    assert (tmp_path / "wandb-id").read_text() == run_id
    assert {run_id} == {found.stem.removeprefix("run-") for found in tmp_path.glob("wandb/*/run-*.wandb")}


def test_trackio_logs_into_its_local_database(tmp_path: Path) -> None:
    assert log_two_steps("trackio", tmp_path).stdout == ""
    log_two_steps("trackio", tmp_path)  # the same run, resumed
    with sqlite3.connect(tmp_path / "trackio" / "overnight.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    database.close()
    assert [(name, step, json.loads(metrics)["loss"]) for name, step, metrics in rows] == [
        ("a run", 1, 10.825),
        ("a run", 2, 9.5),
        ("a run", 1, 10.825),
        ("a run", 2, 9.5),
    ]


def test_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'wandbb'.*'wandb'"):  # noqa: SIM117
        with open_trackers(["tensorboard", "wandbb"], tmp_path, "a run", {}):
            pass
    with open_trackers([], tmp_path, "a run", {}) as log:
        log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_missing_tracker_has_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems([*TRACKERS]) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [problem.rpartition(";")[2] for problem in find_problems([*TRACKERS])] == [
        f" pip install 'overnight[{name}]'" for name in TRACKERS
    ]
