import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overnight.runs import RunsConfig
from overnight.runs.command import next_command, run, runs_table, runs_to_json
from overnight.runs.status import RunStatus


def status(**changes: object) -> RunStatus:
    values = {
        **{"name": "night", "path": "runs/night", "state": "finished", "step": 19_073, "total_steps": 19_073},
        **{"loss": 3.2, "validation_loss": 3.2812, "bits_per_byte": 0.9812, "tokens": 10**10},
        **{"tokens_per_second": 1.2e6, "seconds_left": None, "problem": None},
        **{"on_track": None, "likely_mistake": None},
        **{"last_written_at": datetime(2026, 11, 20, tzinfo=UTC)},
    }
    return RunStatus(**{**values, **changes})  # type: ignore[arg-type]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_runs_are_shown_on_stderr_with_the_next_command(make_run, capsys):
    make_run("day", steps=10)
    make_run("night", written_at=2e9)
    run(RunsConfig())
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[1].split()[:3] == ["day", "finished", "10/10"]
    assert lines[2].split()[:3] == ["night", "stopped", "4/10"]
    assert lines[-1] == "next: overnight train --resume runs/night"


@pytest.mark.parametrize("loss", ["null", "NaN"])
def test_json_is_one_list_on_stdout(make_run, capsys, loss):
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 5, "tokens": 320, "loss": {loss}}}\n')
    run(RunsConfig(json=True))
    out, err = capsys.readouterr()
    assert err == ""
    (found,) = json.loads(out, parse_constant=refuse)
    assert [found[name] for name in ("name", "state", "step", "loss")] == ["night", "stopped", 5, None]


def test_json_values_of_a_status():
    values = runs_to_json(status(loss=math.inf))
    assert (values["loss"], values["last_written_at"]) == (None, "2026-11-20T00:00:00+00:00")


def test_folder_without_runs(here, capsys):
    run(RunsConfig())
    assert capsys.readouterr().err.splitlines()[-1] == "next: overnight quickstart"
    run(RunsConfig(json=True))
    assert json.loads(capsys.readouterr().out) == []
    with pytest.raises(ValueError, match="no folder rnus"):
        run(RunsConfig(folder="rnus"))


def test_one_run_can_be_named(make_run, capsys):
    path = make_run().rename(Path("night"))
    run(RunsConfig(folder=str(path), json=True))
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == "night"


def test_damage_and_rollbacks_are_shown_below_the_table(make_run, capsys):
    path = make_run()
    (path / "recipe.toml").write_text("=")
    (path / "events" / "rollbacks.jsonl").write_text('{"step": 3}\n')
    run(RunsConfig())
    err = capsys.readouterr().err
    assert "runs/night: recipe.toml cannot be read" in err
    assert "once (events/rollbacks.jsonl)" in err


@pytest.mark.parametrize(
    "position, mistake, sign",
    [
        ("above", "dropout is on", "↑"),
        ("below", None, "↓"),
        ("suspect", "layer norms are decayed", "?"),
        ("within", None, None),
        (None, None, None),
    ],
)
def test_run_off_its_reference_is_marked(make_run, capsys, position, mistake, sign):
    make_run(**({"on_track": position, "likely_mistake": mistake} if position else {}))
    run(RunsConfig())
    _, row, *notes = capsys.readouterr().err.splitlines()
    assert (f"4.0000 {sign} " if sign else "4.0000  ") in row
    marked = [note for note in notes if sign and note.startswith(f"runs/night: {sign} ")]
    assert len(marked) == (sign is not None)
    assert (mistake or "") in "".join(marked)
    run(RunsConfig(json=True))
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["on_track"], found["likely_mistake"]) == (position, mistake)


@pytest.mark.parametrize("columns", [80, 120])
def test_table_keeps_to_its_width_and_shortens_only_names(columns):
    now = datetime(2026, 11, 21, tzinfo=UTC)
    long = status(name="a-very-long-name-" * 5, step=12_345)
    running = status(name="[red]x", state="running", seconds_left=47_000.0)
    empty = status(state="empty", step=0, validation_loss=None, bits_per_byte=None, tokens_per_second=None)
    _, first, second, third = runs_table([long, running, empty], now, columns).splitlines()
    assert max(map(len, (first, second, third))) <= columns
    assert "…" in first
    assert {"finished", "12.3k/19.1k", "3.2812", "0.9812", "1.2M"} <= {*first.split()}
    assert second.startswith("[red]x")
    assert "13 h 3 min" in second


@pytest.mark.parametrize(
    "state, command",
    [
        ("finished", "report"),
        ("running", "report"),
        ("stopped", "train --resume"),
        ("damaged", "train --resume"),
    ],
)
def test_next_command_is_about_the_latest_run(state, command):
    assert next_command([status(), status(state=state)]) == f"next: overnight {command} runs/night"
