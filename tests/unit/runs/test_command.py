import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from overnight.runs import command as runs_command
from overnight.runs.status import RunStatus


def begin_run(path: Path, steps: int, total_steps: int = 10, written_at: float = 1e9) -> Path:
    """A run directory as `overnight runs` needs it."""
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text(f'run_name = "{path.name}"\n[schedule]\ntotal_steps = {total_steps}\n')
    lines = [
        {"step": n, "tokens": 64 * n, "loss": 4.5, "tokens_per_second": 9e4} for n in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path / "metrics.jsonl", (written_at, written_at))
    (path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    return path


def status(**changes: object) -> RunStatus:
    values = {
        **{"name": "night", "path": "runs/night", "state": "finished", "step": 19_073, "total_steps": 19_073},
        **{"loss": 3.2, "validation_loss": 3.2812, "bits_per_byte": 0.9812, "tokens": 10**10},
        **{"tokens_per_second": 1.2e6, "seconds_left": None, "problem": None},
        **{"on_track": None, "likely_mistake": None},
        **{"last_written_at": datetime(2026, 11, 20, tzinfo=UTC)},
    }
    return RunStatus(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_told_on_stderr_with_the_next_command(here, capsys):
    begin_run(here / "runs" / "day", steps=10)
    begin_run(here / "runs" / "night", steps=4, written_at=2e9)
    runs_command.run(runs_command.RunsConfig())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert lines[1].split()[:3] == ["day", "finished", "10/10"]
    assert lines[2].split()[:3] == ["night", "stopped", "4/10"]
    assert lines[-1] == "next: overnight train --resume runs/night"


def test_a_run_without_its_last_checkpoint_is_to_be_resumed(here, capsys):
    (begin_run(here / "runs" / "day", steps=10) / "checkpoints" / "step-00000010").rmdir()
    runs_command.run(runs_command.RunsConfig())
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].split()[:3] == ["day", "stopped", "10/10"]
    assert lines[-1] == "next: overnight train --resume runs/day"


@pytest.mark.parametrize("loss", ["null", "NaN"])
def test_json_is_one_list_on_stdout(here, capsys, loss):
    run = begin_run(here / "runs" / "night", steps=4)
    (run / "metrics.jsonl").write_text(f'{{"step": 4, "tokens": 256, "loss": {loss}}}\n')
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    runs_command.run(runs_command.RunsConfig(json=True))
    out, err = capsys.readouterr()
    assert err == ""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (found,) = json.loads(out, parse_constant=refuse)
    assert found["name"] == "night"
    assert (found["state"], found["step"], found["total_steps"], found["loss"]) == ("stopped", 4, 10, None)
    assert found["last_written_at"] == "2001-09-09T01:46:40+00:00"


def test_a_folder_without_runs_says_how_to_begin(here, capsys):
    runs_command.run(runs_command.RunsConfig())
    assert capsys.readouterr().err.splitlines() == [
        "there are no runs in runs/ yet",
        "next: overnight quickstart",
    ]
    runs_command.run(runs_command.RunsConfig(json=True))
    assert json.loads(capsys.readouterr().out) == []


def test_a_folder_that_is_not_there_is_refused(here):
    with pytest.raises(ValueError, match="there is no folder rnus"):
        runs_command.run(runs_command.RunsConfig(folder="rnus"))


def test_one_run_can_be_asked_about(here, capsys):
    begin_run(here / "elsewhere" / "night", steps=4)
    runs_command.run(runs_command.RunsConfig(folder="elsewhere/night", json=True))
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == "elsewhere/night"


def test_damage_is_told_below_the_table(here, capsys):
    run = begin_run(here / "runs" / "night", steps=4)
    (run / "recipe.toml").write_text("=")
    runs_command.run(runs_command.RunsConfig())
    assert "runs/night: recipe.toml cannot be read" in capsys.readouterr().err


def evaluate(run: Path, **facts: object) -> None:
    (run / "events").mkdir()
    line = {"step": 4, "tokens": 256, "loss": 4.0, "bits_per_byte": 1.5} | facts
    (run / "events" / "evaluations.jsonl").write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    "facts, sign, told",
    [
        (
            {"on_track": "above", "likely_mistake": "dropout is on"},
            " ↑",
            "above its reference; likeliest: dropout is on",
        ),
        ({"on_track": "below", "likely_mistake": None}, " ↓", "below its reference"),
        (
            {"on_track": "suspect", "likely_mistake": "layer norms are decayed"},
            " ?",
            "within its reference, and suspect; likeliest: layer norms are decayed",
        ),
        ({"on_track": "within", "likely_mistake": None}, "", None),
        ({}, "", None),
    ],
)
def test_a_run_that_is_off_its_reference_is_marked(here, capsys, facts, sign, told):
    evaluate(begin_run(here / "runs" / "night", steps=4), **facts)
    runs_command.run(runs_command.RunsConfig())
    lines = capsys.readouterr().err.splitlines()
    assert f"4.0000{sign}  1.5000" in lines[1].replace("     ", "  ")
    killed = "runs/night: stopped by a kill, or a loss of power: nothing was noted"
    assert lines[2:-1] == [killed, *([f"runs/night:{sign} {told}"] if told else [])]
    runs_command.run(runs_command.RunsConfig(json=True))
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["on_track"], found["likely_mistake"]) == (
        facts.get("on_track"),
        facts.get("likely_mistake"),
    )


def test_the_table_keeps_to_its_width_and_shortens_only_names():
    now = datetime(2026, 11, 21, tzinfo=UTC)
    long = status(name="a-very-long-name-" * 5, step=12_345)
    running = status(name="[red]x", state="running", seconds_left=47_000.0)
    empty = status(state="empty", step=0, validation_loss=None, bits_per_byte=None, tokens_per_second=None)
    for columns in (80, 120):
        lines = runs_command.runs_table([long, running, empty], now, columns).splitlines()
        assert len(lines) == 4
        assert max(map(len, lines)) <= columns
        assert "…" in lines[1]
        assert lines[1].split()[1:] == [
            "finished",
            "12.3k/19.1k",
            "3.2812",
            "0.9812",
            "1.2M",
            "1",
            "d",
            "ago",
        ]
        assert lines[2].startswith("[red]x")
        assert lines[2].endswith("13 h 3 min left")


@pytest.mark.parametrize(
    "state, command",
    [
        ("finished", "next: overnight report runs/night"),
        ("running", "next: overnight report runs/night"),
        ("stopped", "next: overnight train --resume runs/night"),
    ],
)
def test_the_next_command_is_about_the_latest_run(state, command):
    assert runs_command.resume_command([status(), status(state=state)]) == command


def test_numbers_that_are_not_finite_are_null_in_json():
    told = runs_command.runs_to_json(
        status(loss=math.inf, last_written_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=1))
    )
    assert told["loss"] is None
    assert told["last_written_at"] == "2026-01-01T01:00:00+00:00"
