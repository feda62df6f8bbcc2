import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overnight.runs import RunsConfig
from overnight.runs.command import run, runs_table
from overnight.runs.status import describe_run


def test_runs_are_shown_on_stderr_with_the_next_command(make_run, capsys):
    make_run("day", steps=10)
    run(RunsConfig())
    assert capsys.readouterr().err.splitlines()[-1] == "next: overnight report runs/day"
    night = make_run("night", written_at=2e9)
    run(RunsConfig())
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[1].split()[:3] == ["day", "finished", "10/10"]
    assert lines[2].split()[:3] == ["night", "stopped", "4/10"]
    assert lines[-1] == "next: overnight train --resume runs/night"

    (night / "recipe.toml").write_text("=")
    (night / "events" / "rollbacks.jsonl").write_text('{"step": 3}\n')
    run(RunsConfig())
    err = capsys.readouterr().err
    assert "runs/night: recipe.toml cannot be read" in err
    assert "once (events/rollbacks.jsonl)" in err
    assert err.splitlines()[-1] == "next: overnight train --resume runs/night"


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])
def test_json_is_one_list_on_stdout(make_run, capsys, loss):
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 5, "tokens": 320, "loss": {loss}}}\n')
    written_at = datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime, UTC)
    named = path.rename(Path("night"))
    run(RunsConfig(folder=str(named), json=True))
    out, err = capsys.readouterr()
    assert err == ""
    (found,) = json.loads(out, parse_constant=pytest.fail)
    assert [found[name] for name in ("path", "state", "step", "loss")] == ["night", "stopped", 5, None]
    assert found["last_written_at"] == written_at.isoformat(timespec="seconds")


def test_folder_without_runs(here, capsys):
    run(RunsConfig())
    assert capsys.readouterr().err.splitlines()[-1] == "next: overnight quickstart"
    run(RunsConfig(json=True))
    assert json.loads(capsys.readouterr().out) == []
    with pytest.raises(ValueError, match="folder rnus does not exist"):
        run(RunsConfig(folder="rnus"))


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
def test_table_keeps_to_its_width_and_shortens_only_names(make_run, columns):
    long = describe_run(make_run("a-very-long-name-" * 5))
    long = dataclasses.replace(long, step=12_345, total_steps=19_073, tokens_per_second=1.2e6)
    running = dataclasses.replace(long, name="[red]x", state="running", seconds_left=47_000.0)
    empty = dataclasses.replace(long, validation_loss=None, bits_per_byte=None, tokens_per_second=None)
    _, first, second, third = runs_table([long, running, empty], datetime.now(UTC), columns).splitlines()
    assert max(map(len, (first, second, third))) <= columns
    assert "…" in first
    assert {"stopped", "12.3k/19.1k", "4.0000", "1.5000", "1.2M"} <= {*first.split()}
    assert second.startswith("[red]x")
    assert "13 h 3 min" in second
