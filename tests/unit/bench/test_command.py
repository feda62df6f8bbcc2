"""The command from its options to its files, and the processes that it starts and ends."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from overnight import cli
from overnight.bench import BenchConfig, worker
from overnight.bench import command as bench_command
from overnight.bench.command import BenchPlan, divide, estimate_bytes, find_free_bytes, plan_bench, read_ids
from overnight.bench.variants import baseline_compute
from overnight.bench.worker import StepTask, StepWorker, TimedSteps, running_workers
from overnight.data.shards import read_manifest
from overnight.distributed import machine
from overnight.model import model_config
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, context_length=16, vocab_size=300)
GB = 10**9


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a test has time for, beside the published ones."""
    monkeypatch.setitem(model_config.PRESETS, "tiny", TINY)


def plan_of(memory_bytes: float, monkeypatch: pytest.MonkeyPatch, **options: object) -> BenchPlan:
    """The ladder of GPT-2 124M on a CPU with so much memory to spare."""
    monkeypatch.setattr(bench_command, "find_free_bytes", lambda device: memory_bytes)
    monkeypatch.setattr(bench_command, "find_memory_bytes", lambda device: int(memory_bytes))
    return plan_bench(BenchConfig(**options), "cpu")  # type: ignore[arg-type]


# ---------------------------------------------------------------- the whole of it


def test_a_ladder_is_climbed_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_command, "measure_matmul_flops", lambda device, precision, repeats: 1e12)
    words = ["ladder", "--model", "tiny", "--device", "cpu", "--variants", "fused-adamw"]
    assert cli.main([*words, "--steps", "1", "--out", "made", "--json"]) == cli.DONE
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [rung["name"] for rung in told["rungs"]] == ["float32", "fused-adamw"]
    assert [rung["settings"]["fused_optimizer"] for rung in told["rungs"]] == [False, True]
    for rung in told["rungs"]:
        assert len(rung["milliseconds"]) == 1
        assert len(rung["losses"]) == bench_command.WARM_UPS + 1
        assert rung["figures"]["is_equal"]
        assert rung["peak_bytes"] > 1e7
        assert 0 < rung["figures"]["mfu"] < 1
    first, second = told["rungs"]
    assert second["milliseconds_before"] == first["milliseconds"]
    assert second["losses"] == pytest.approx(first["losses"], abs=1e-5)
    lines = err.splitlines()
    assert lines[-1] == "next: overnight train tiny"
    assert any(line.startswith("fused-adamw ") and line.endswith(" ok") for line in lines)
    assert json.loads((tmp_path / "made/ladder.json").read_text()) == told
    assert "| fused-adamw " in (tmp_path / "made/ladder.md").read_text()
    assert (tmp_path / "made/ladder.svg").read_text().startswith("<svg ")


def test_a_rung_that_computes_something_else_makes_the_command_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(plan: BenchPlan) -> object:
        turn = TimedSteps(1.0, (5.0,), 10**9)
        wrong = TimedSteps(1.0, (5.1,), 10**9)
        rounds = [{"float32": turn, "fused-adamw": wrong}] * plan.rounds
        climbed = bench_command.pair_up(["float32", "fused-adamw"], rounds)
        return bench_command.build_record(plan, climbed, 1e12, "a text")

    monkeypatch.setattr(bench_command, "measure_variants", measured)
    words = ["ladder", "--model", "tiny", "--device", "cpu", "--variants", "fused-adamw"]
    assert cli.main(words) == cli.FAILED
    err = capsys.readouterr().err
    assert "NOT EQUAL" in err
    assert err.splitlines()[-1].startswith("overnight: fused-adamw: the losses differ from float32's")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "gpt2-123m"], "there is no model gpt2-123m; did you mean gpt2-124m?"),
        (["--variants", "fused-adam"], "there is no rung fused-adam; did you mean fused-adamw?"),
        (["--variants", "tf32"], "the rung tf32 can't be climbed here: it takes an NVIDIA GPU since"),
        (["--rows", "0"], "--rows 0 is too few; give at least 1"),
        (["--steps=0"], "--steps 0 is too few; give at least 1"),
        (["--context-length", "4096"], "--context-length 4096 is more than the 1024 of gpt2-124m"),
        (["--device", "gpu"], "device=gpu is not known"),
        (["--model", "gpt3-175b"], "two rungs at a time need "),
        (["--out", __file__], f"--out {__file__} is a file; name a folder"),
        (["--data", "no-such-text"], "no-such-text"),
        (["--model", "tiny", "--rows", "100000000"], "take fewer --rows"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_plain_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ladder", "--device", "cpu", *words]) == cli.WRONG_USE
    err = capsys.readouterr().err
    assert err.startswith("overnight: ")
    assert err.count("\n") == 1
    assert sentence in err


# ---------------------------------------------------------------- the plan


def test_all_rungs_take_turns_where_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch)
    assert [list(group) for group in plan.groups] == [list(plan.tasks)]


def test_where_it_does_not_each_group_begins_with_the_last_rung_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(16 * GB, monkeypatch)
    assert len(plan.groups) > 1
    for before, after in zip(plan.groups, plan.groups[1:], strict=False):
        assert before[-1] == after[0]
    climbed = [*plan.groups[0], *(name for group in plan.groups[1:] for name in group[1:])]
    assert climbed == list(plan.tasks)
    for group in plan.groups:
        assert len(group) > 1
        assert estimate_bytes(plan.tasks[name] for name in group) <= 16 * GB
    with pytest.raises(ValueError, match=r"two rungs at a time need .* GB, and cpu has 4\.5 GB to spare"):
        plan_of(5 * GB, monkeypatch)
    with pytest.raises(ValueError, match="take fewer --rows"):
        plan_of(1 * GB, monkeypatch, rungs=("float32",))


def test_a_lone_rung_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch, rungs=("float32",))
    assert [list(group) for group in plan.groups] == [["float32"]]
    assert divide(plan.tasks, 1.0) == []


def test_the_step_is_larger_only_for_a_larger_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch)
    assert {task.tokens_per_step for task in plan.tasks.values()} == {2 * 1024}
    assert [task.micro_batches for task in plan.tasks.values()] == [*[2] * (len(plan.tasks) - 1), 1]
    alone = plan_of(64 * GB, monkeypatch, rungs=("fused-adamw",), rows=3, context_length=256)
    assert alone.ground.tokens_per_step == 3 * 256
    assert alone.ground.micro_batches == 1


def test_free_memory_is_at_most_all_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:       3000 kB\n")
    monkeypatch.setattr(bench_command, "MEMINFO", meminfo)
    assert find_free_bytes("cpu") == 3000 * 1024
    monkeypatch.setattr(bench_command, "find_memory_bytes", lambda device: 1000)  # a container's limit
    assert find_free_bytes("cpu") == 1000


def test_python_s_documentation_is_read_where_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch, model="tiny", rungs=("float32",))
    ids, origin = read_ids(plan)  # GPT-2's vocabulary is not in a test's cache
    assert origin == "the bytes of Python's documentation"
    assert len(ids) == plan.tokens_to_read == (bench_command.WARM_UPS + 3 + 1) * 16 + 1
    assert bytes(ids.astype(np.uint8)).isascii()


def test_a_prepared_text_is_read_again_if_it_is_short_and_refused_if_it_is_another_vocabulary_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"this: {number}")
    out = str(tmp_path / "made")
    prepare(PrepareConfig(source=str(tmp_path), tokenizer="characters", out=out, validation_fraction=0.3))
    plan = plan_of(64 * GB, monkeypatch, model="tiny", rungs=("float32",), data=out)
    ids, origin = read_ids(plan)
    assert origin == out
    assert len(ids) == plan.tokens_to_read
    (once,) = (shard.tokens for shard in read_manifest(Path(out)).shards("train"))
    assert (ids[once:] == ids[:-once]).all()
    few = dataclasses.replace(TINY, vocab_size=5)
    with pytest.raises(ValueError, match="ids and the model knows 5: prepare the text with --tokenizer gpt2"):
        read_ids(dataclasses.replace(plan, ground=dataclasses.replace(plan.ground, model=few)))


# ---------------------------------------------------------------- the processes


def task_of(ids: Path) -> StepTask:
    return StepTask(
        model=TINY,
        compute=baseline_compute("cpu"),
        ids=str(ids),
        rows_per_step=1,
        micro_batches=1,
        vocabulary_multiple=1,
        fused_optimizer=False,
        large_pages=False,
    )


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupt(process: StepWorker) -> None:
        started.append(process.pid)
        assert is_alive(process.pid)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepWorker, "wait_until_ready", interrupt)
    tasks = {name: task_of(tmp_path / "ids.npy") for name in ("first", "second")}
    with pytest.raises(KeyboardInterrupt), running_workers(tasks):
        pass
    assert len(started) == 2
    assert not any(map(is_alive, started))


@pytest.mark.parametrize(
    ("program", "error", "sentence"),
    [
        ('print(\'{"problem": "the memory of cuda does not suffice"}\')', ValueError, "fewer --rows"),
        ("import os; os.kill(os.getpid(), 9)", ValueError, "was killed, most likely for its memory"),
        ("raise SystemExit('no compiler')", ChildProcessError, "(?s)ended with status 1.*no compiler"),
    ],
)
def test_memory_that_does_not_suffice_is_the_user_s_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], sentence: str
) -> None:
    monkeypatch.setattr(worker, "PROGRAM", ("-c", program))
    with pytest.raises(error, match=sentence), running_workers({"bf16": task_of(tmp_path)}):
        pass


def test_a_process_is_started_with_the_allocator_it_is_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "of the user's own")
    assert machine.environment_of_process(large_pages=True)["GLIBC_TUNABLES"] == machine.ALLOCATOR
    plain = machine.environment_of_process(large_pages=False)
    assert "GLIBC_TUNABLES" not in plain
    assert plain["PATH"] == os.environ["PATH"]
