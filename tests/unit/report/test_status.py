import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overnight.runs.status import describe_run, find_run, find_setting, list_runs


def test_a_finished_run(make_run):
    run = make_run(steps=50, total_steps=50)
    status = describe_run(run)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    evaluation = json.loads((run / "events" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (status.name, status.path, status.state) == ("night", str(run), "finished")
    assert (status.step, status.total_steps, status.tokens) == (50, 50, 50 * 524_288)
    assert status.loss == last["loss"]
    assert (status.validation_loss, status.bits_per_byte) == (evaluation["loss"], evaluation["bits_per_byte"])
    assert status.tokens_per_second == pytest.approx(1.13e6, rel=0.05)
    assert status.seconds_left is None
    assert status.problem is None
    assert status.last_written_at is not None
    assert abs((datetime.now(UTC) - status.last_written_at).total_seconds()) < 60


def test_a_stopped_run(make_run):
    status = describe_run(make_run(steps=20, total_steps=50))
    assert (status.state, status.step, status.total_steps) == ("stopped", 20, 50)


def test_a_run_killed_before_its_last_checkpoint_is_stopped(make_run):
    run = make_run(steps=50, total_steps=50)
    (run / "checkpoints" / "step-00000050").rename(run / "checkpoints" / ".building-step-00000050")
    status = describe_run(run)
    assert (status.state, status.step, status.total_steps) == ("stopped", 50, 50)


def test_an_empty_run(make_run):
    run = make_run(steps=1)
    (run / "metrics.jsonl").unlink()
    status = describe_run(run)
    assert (status.state, status.step, status.loss, status.last_written_at) == ("empty", 0, None, None)
    (run / "metrics.jsonl").touch()
    assert describe_run(run).state == "empty"


def test_a_run_is_running_while_another_process_holds_its_lock(make_run):
    run = make_run(steps=20, total_steps=50)
    program = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        status = describe_run(run)
        assert status.state == "running"
        assert status.seconds_left == pytest.approx(30 * 0.462, rel=0.05)
        ramp_from_here(run, status.tokens)
        steps = [524_288] * 20 + [1_048_576] * 30
        speed = describe_run(run).tokens_per_second
        assert describe_run(run).seconds_left == pytest.approx(sum(steps[20:]) / speed)
        (run / "recipe.toml").write_text(recipe_without(run, "tokens_per_step"))
        assert describe_run(run).seconds_left is None
        holder.communicate()
    assert (run / ".lock").exists()
    assert describe_run(run).state == "stopped"


def ramp_from_here(run: Path, tokens: int) -> None:
    """Let the steps be twice as large once so many tokens are seen."""
    recipe = (run / "recipe.toml").read_text()
    ramp = f"tokens_per_step = 1048576\nramp_from_tokens_per_step = 524288\nramp_tokens = {tokens}"
    (run / "recipe.toml").write_text(recipe.replace("tokens_per_step = 524288", ramp))


def recipe_without(run: Path, setting: str) -> str:
    lines = (run / "recipe.toml").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(f"{setting} "))


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n', "metrics.jsonl line 1 is damaged"),
        ("events/evaluations.jsonl", b"x\n{}\n", "evaluations.jsonl line 1 is damaged"),
        ("recipe.toml", b"total_steps = = 3", "recipe.toml cannot be read"),
        ("recipe.toml", b"\xff", "recipe.toml is damaged"),
        ("recipe.toml", b"# These are 2 lines.\n", "recipe.toml has 1 lines of 2: take it from"),
        ("recipe.toml", None, "recipe.toml is missing"),
    ],
)
def test_a_damaged_run_says_what_and_where(make_run, file, content, problem):
    run = make_run(steps=20, total_steps=20)
    assert describe_run(run).state == "finished"
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    status = describe_run(run)
    assert status.state == "damaged"
    assert status.problem is not None
    assert problem in status.problem


def test_a_torn_last_line_does_not_damage_a_run(make_run):
    run = make_run(steps=20, total_steps=50)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    status = describe_run(run)
    assert (status.state, status.step, status.problem) == ("stopped", 20, None)


def test_runs_are_listed_latest_last_and_other_folders_left_out(make_run, tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        metrics = make_run(name, steps=2, total_steps=2) / "metrics.jsonl"
        os.utime(metrics, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "comparison.html").touch()
    assert [run.name for run in list_runs(tmp_path / "runs")] == ["oldest", "old", "new"]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_path_or_by_name(make_run, tmp_path):
    run = make_run("gpt2-night", steps=1)
    assert find_run(str(run)) == run
    assert find_run("gpt2-night", tmp_path / "runs") == run


@pytest.mark.parametrize(
    "name, words",
    [("gpt2-nihgt", "did you mean .*gpt2-night?"), ("unlike", "`overnight runs` lists what there is")],
)
def test_a_run_that_is_not_there_gets_the_nearest_name(make_run, tmp_path, name, words):
    make_run("gpt2-night", steps=1)
    with pytest.raises(ValueError, match=f"there is no run {name}; {words}"):
        find_run(name, tmp_path / "runs")


def test_a_folder_that_is_no_run_is_called_so(tmp_path):
    with pytest.raises(ValueError, match="is a folder but not a run"):
        find_run(str(tmp_path))


def test_a_setting_is_found_in_whichever_section_holds_it():
    recipe = {"seed": 1, "data": {"data": "d"}, "schedule": {"total_steps": 7}}
    assert find_setting(recipe, "seed") == 1
    assert find_setting(recipe, "total_steps") == 7
    assert find_setting(recipe, "data") == "d"
    assert find_setting(recipe, "warmup_steps") is None


def test_fifty_long_runs_are_listed_within_a_second(make_run, tmp_path):
    """The metrics are links to one file of 100,000 lines; only their ends are read, so that costs nothing."""
    run = make_run("run-00", steps=1, total_steps=100_000)
    line = (run / "metrics.jsonl").read_text()
    long = tmp_path / "long.jsonl"
    with long.open("w") as file:
        file.writelines(line.replace('"step": 1,', f'"step": {step},') for step in range(1, 100_001))
    for number in range(50):
        folder = tmp_path / "runs" / f"run-{number:02}"
        (folder / "checkpoints" / "step-00100000").mkdir(parents=True)
        (folder / "recipe.toml").write_bytes((run / "recipe.toml").read_bytes())
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        (folder / "metrics.jsonl").symlink_to(long)
    started_at = time.process_time()
    runs = list_runs(tmp_path / "runs")
    cpu_seconds = time.process_time() - started_at
    assert [(run.state, run.step) for run in runs] == [("finished", 100_000)] * 50
    assert cpu_seconds < 1


def test_nothing_heavy_is_imported(tmp_path: Path):
    program = (
        "import sys, overnight.report.status as s, pathlib; s.list_runs(pathlib.Path('.'));"
        "print([m for m in ('torch', 'matplotlib', 'numpy', 'tyro') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
