import errno
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overnight.runs import json_lines
from overnight.runs.status import RunStatus, describe_run, find_run, flat_settings, list_runs


def test_finished_run(make_run):
    run = make_run(steps=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # a torn last line is no damage
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    assert describe_run(run) == RunStatus(
        name="night",
        path="runs/night",
        state="finished",
        step=10,
        total_steps=10,
        loss=0.9,
        validation_loss=4.0,
        bits_per_byte=1.5,
        on_track=None,
        likely_mistake=None,
        tokens=640,
        tokens_per_second=9e4,
        seconds_left=None,
        last_written_at=datetime.fromtimestamp(1e9, UTC),
        problem=None,
    )
    (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / ".building-step-00000010")
    assert describe_run(run).state == "stopped"


def test_empty_run(make_run):
    run = make_run(steps=0)
    assert describe_run(run).state == "empty"
    (run / "metrics.jsonl").unlink()
    status = describe_run(run)
    assert (status.state, status.step, status.loss, status.last_written_at) == ("empty", 0, None, None)


@pytest.mark.parametrize(
    "reason, state, ended_by",
    [
        (None, "stopped", "a kill or a power failure: no reason was recorded"),
        ("max_time", "stopped", "max_time"),
        ("FloatingPointError: loss", "diverged", "loss"),
    ],
)
def test_why_a_run_ended(make_run, reason, state, ended_by):
    run = make_run()
    if reason:
        (run / "ended.json").write_text(json.dumps({"step": 4, "reason": reason}))
    status = describe_run(run)
    assert (status.state, status.ended_by) == (state, ended_by)


def test_run_is_running_while_another_process_holds_its_lock(make_run):
    run = make_run()
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert describe_run(run).state == "running"
        assert describe_run(run).seconds_left == pytest.approx(6 * 64 / 9e4)
        recipe = (run / "recipe.toml").read_text()
        ramp = "tokens_per_step = 128\n{} = 64\n{} = 256\n"  # the steps double where the run is now
        for names in (
            ("ramp_from_tokens_per_step", "ramp_tokens"),
            ("batch_ramp_start_tokens", "batch_ramp_tokens"),
        ):
            (run / "recipe.toml").write_text(recipe.replace("tokens_per_step = 64\n", ramp.format(*names)))
            assert describe_run(run).seconds_left == pytest.approx(6 * 128 / 9e4)
        (run / "recipe.toml").write_text(recipe.replace("tokens_per_step = 64\n", ""))
        assert describe_run(run).seconds_left is None
        holder.communicate("\n")
    assert describe_run(run).state == "stopped"


def evaluation(bits: bytes) -> bytes:
    return b'{"step": 4, "tokens": 256, "loss": 4.0, "on_track": [], "bits_per_byte": %s}\n' % bits


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n', "metrics.jsonl line 1"),
        ("events/evaluations.jsonl", evaluation(b'"none"'), "'none' as its last bits_per_byte"),
        ("events/evaluations.jsonl", evaluation(b"1" + b"0" * 400), "as its last bits_per_byte"),
        ("recipe.toml", b"a = " + b"[" * 100_000, "recipe.toml cannot be read"),
        ("events/evaluations.jsonl", b"x\n{}\n", "evaluations.jsonl line 1"),
        ("recipe.toml", b"total_steps = = 3", "recipe.toml cannot be read"),
        ("recipe.toml", b"\xff", "recipe.toml"),
        ("recipe.toml", b"# These are 2 lines.\n", "recipe.toml"),
        ("recipe.toml", None, "recipe.toml is missing"),
    ],
)
def test_damaged_run_names_the_file(make_run, file, content, problem):
    run = make_run(steps=10)
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    status = describe_run(run)
    assert status.state == "damaged"
    assert status.problem is not None
    assert problem in status.problem


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.toml", "events/evaluations.jsonl", "record.json"])
def test_run_with_an_unreadable_file_hides_no_other(make_run, monkeypatch, name):
    make_run("whole", written_at=2e9)
    broken = make_run("broken") / name
    broken.touch()
    read = Path.open

    def refused(self, *given, **named):
        if self == broken:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read(self, *given, **named)

    assert {run.name for run in list_runs(Path("runs"))} == {"whole", "broken"}
    monkeypatch.setattr(Path, "open", refused)
    first, second = list_runs(Path("runs"))
    assert (second.name, second.state, second.problem) == ("whole", "stopped", None)
    assert (first.name, first.state) == ("broken", "damaged")
    assert first.problem == f"{name} cannot be read: Permission denied"


def test_folder_without_permission_is_listed(make_run, monkeypatch):
    make_run("whole")
    closed = Path("runs/closed")
    closed.mkdir()
    is_file = Path.is_file

    def refused(self):
        if closed in self.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return is_file(self)

    assert [run.name for run in list_runs(Path("runs"))] == ["whole"]
    monkeypatch.setattr(Path, "is_file", refused)
    assert [(run.name, run.state) for run in list_runs(Path("runs"))] == [
        ("closed", "damaged"),
        ("whole", "stopped"),
    ]
    with pytest.raises(ValueError, match="no run whole-; did you mean runs/whole"):
        find_run("whole-")


def test_runs_are_listed_latest_last(make_run):
    for age, name in enumerate(("new", "old", "oldest")):
        make_run(name, written_at=1e9 - age)
    Path("runs/notes").mkdir()
    Path("runs/comparison.html").touch()
    assert [run.name for run in list_runs(Path("runs"))] == ["oldest", "old", "new"]
    assert list_runs(Path("nowhere")) == []


def test_find_run_by_path_or_name(make_run):
    run = make_run("gpt2-night")
    assert find_run("gpt2-night") == find_run(str(run)) == run
    with pytest.raises(ValueError, match="no run gpt2-nihgt; .*gpt2-night"):
        find_run("gpt2-nihgt")
    with pytest.raises(ValueError, match="no run unlike"):
        find_run("unlike")
    with pytest.raises(ValueError, match="runs is a folder but not a run"):
        find_run("runs")


def test_settings_have_their_names_of_today():
    old = {"start_from": "gpt2", "data": {"data": "d"}, "compute": {"head": "whole"}}
    assert flat_settings(old) == {"init_from": "gpt2", "data": "d", "loss": "full"}
    new = {"init_from": "gpt2", "batch": {"micro_batch_size": 7}}
    assert flat_settings(new) == {"init_from": "gpt2", "micro_batch_size": 7}


def test_long_runs_are_read_from_their_ends_only(make_run, monkeypatch):
    run = make_run(steps=20_000, total_steps=20_000)
    parsed, parse_line = [], json_lines._parse_line
    monkeypatch.setattr(json_lines, "_parse_line", lambda *given: parsed.append(1) or parse_line(*given))
    assert describe_run(run).state == "finished"
    assert len(parsed) < 3_000


def test_nothing_heavy_is_imported(make_run):
    make_run()
    program = (
        "import sys, overnight.runs.status as s, pathlib; s.list_runs(pathlib.Path('runs'));"
        "print([m for m in ('torch', 'matplotlib', 'numpy', 'jinja2') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert answer.stdout.strip() == "[]"
