import dataclasses
import json
import os
from datetime import UTC, datetime

import pytest

from overnight.runs import RunsConfig
from overnight.runs.command import run, runs_table
from overnight.runs.status import describe_run


def test_unfinished_run_is_shown_with_the_command_that_resumes_it(make_run, capsys):
    make_run("day", steps=10)
    night = make_run("night", written_at=2e9)
    run(RunsConfig())
    out, err = capsys.readouterr()
    _, *rows, last = err.splitlines()
    assert out == ""
    shown = [row.split()[:3] for row in rows[:2]]
    assert shown == [["day", "finished", "10/10"], ["night", "stopped", "4/10"]]
    assert last == "next: overnight train --resume runs/night"

    (night / "recipe.toml").write_text("=")
    (night / "events" / "rollbacks.jsonl").write_text('{"step": 3}\n')
    run(RunsConfig())
    err = capsys.readouterr().err
    assert "runs/night: recipe.toml cannot be read" in err
    assert "once (events/rollbacks.jsonl)" in err
    assert err.splitlines()[-1] == last


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])
def test_json_is_one_list_on_stdout(make_run, capsys, loss):
    path = make_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 5, "tokens": 320, "loss": {loss}}}\n')
    os.utime(path / "metrics.jsonl", (1e9, 1e9))
    run(RunsConfig(folder=str(path), json=True))
    out, err = capsys.readouterr()
    assert err == ""
    (found,) = json.loads(out, parse_constant=pytest.fail)
    assert found["loss"] is None
    assert found["last_written_at"] == "2001-09-09T01:46:40+00:00"


def test_folder_without_runs(here, capsys):
    run(RunsConfig())
    assert capsys.readouterr().err.splitlines()[-1] == "next: overnight quickstart"
    run(RunsConfig(json=True))
    assert json.loads(capsys.readouterr().out) == []


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
    _, row, *notes = capsys.readouterr().err.replace("\n  ", " ").splitlines()
    assert (f"4.0000 {sign} " if sign else "4.0000  ") in row
    marked = [note for note in notes if sign and note.startswith(f"runs/night: {sign} ")]
    assert len(marked) == (sign is not None)
    assert (mistake or "") in "".join(marked)
    run(RunsConfig(json=True))
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["on_track"], found["likely_mistake"]) == (position, mistake)


@pytest.mark.parametrize(
    "columns, left_out", [(200, set()), (120, {"tokens/s", "bits/byte"}), (90, {"val loss", "step", "state"})]
)
def test_table_keeps_to_its_width_and_leaves_out_columns(make_run, columns, left_out):
    """Names are complete: they identify the lines."""
    name = "a-very-long-name-" * 5
    long = describe_run(make_run(name))
    long = dataclasses.replace(long, step=12_345, total_steps=19_073, tokens_per_second=1.2e6)
    running = dataclasses.replace(long, name="[red]x", state="running", seconds_left=47_000.0)
    empty = dataclasses.replace(long, validation_loss=None, bits_per_byte=None, tokens_per_second=None)
    titles, first, second, third = runs_table([long, running, empty], datetime.now(UTC), columns).splitlines()
    assert max(map(len, (first, second, third))) <= columns
    assert first.startswith(name)
    assert second.startswith("[red]x")
    assert not any(title in titles for title in left_out)
    if not left_out:
        assert {"stopped", "12.3k/19.1k", "4.0000", "1.5000", "1.2M"} <= {*first.split()}
        assert "13 h 3 min" in second


def test_name_without_room_goes_on_in_the_next_line(make_run):
    table = runs_table([describe_run(make_run("long" * 10))], datetime.now(UTC), 20)
    assert "".join(table.split()[1:]) == "long" * 10
