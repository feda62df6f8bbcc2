"""The command from its options to its files, and the processes that it starts and ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from overnight import cli
from overnight.bench import BenchConfig, decide, worker
from overnight.bench import command as bench_command
from overnight.bench.command import build_record, read_ids
from overnight.bench.decide import BenchPlan, decide_bench, find_free_bytes, memory_of_tasks
from overnight.bench.table import BenchRecord
from overnight.bench.worker import WARM_UPS, StepWorker, TimedSteps, running_workers
from overnight.data.shards import read_manifest
from overnight.distributed import launcher
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig

from .conftest import TINY, task_of

GB = 10**9
ANSWER = "import sys; from multiprocessing.connection import Connection as C; C(int(sys.argv[1]))"
FUSED = ["bench", "--model", "tiny", "--device", "cpu", "--variants", "fused-adamw"]


def plan_of(memory_bytes: float, monkeypatch: pytest.MonkeyPatch, **options: object) -> BenchPlan:
    """The benchmark of GPT-2 124M on a CPU with so much free memory."""
    monkeypatch.setattr(decide, "find_free_bytes", lambda device: memory_bytes)
    monkeypatch.setattr(decide, "find_memory_bytes", lambda device: int(memory_bytes))
    return decide_bench(BenchConfig(**options), "cpu")  # type: ignore[arg-type]


def test_bench_measures_shows_and_writes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "measure_matmul_flops", lambda device, precision, repeats: 1e12)
    assert cli.main([*FUSED, "--steps", "1", "--out", "made", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [variant["name"] for variant in found["rungs"]] == ["float32", "fused-adamw"]
    assert [variant["settings"]["fused_optimizer"] for variant in found["rungs"]] == [False, True]
    for variant in found["rungs"]:
        assert len(variant["milliseconds"]) == 1
        assert len(variant["losses"]) == WARM_UPS + 1
        assert variant["figures"]["is_equal"]
        assert variant["peak_bytes"] > 1e7
        assert 0 < variant["figures"]["mfu"] < 1
    first, second = found["rungs"]
    assert second["milliseconds_before"] == first["milliseconds"]
    assert second["losses"] == pytest.approx(first["losses"], abs=1e-5)
    assert err.splitlines()[-1] == "next: overnight train tiny"
    assert json.loads((here / "made/ladder.json").read_text()) == found
    assert "| fused-adamw " in (here / "made/ladder.md").read_text()
    assert (here / "made/ladder.svg").read_text().startswith("<svg ")


def test_wrong_losses_make_the_command_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(plan: BenchPlan) -> BenchRecord:
        results = {"float32": TimedSteps(1.0, [5.0], GB), "fused-adamw": TimedSteps(1.0, [5.1], GB)}
        return build_record(plan, [[results] * plan.rounds], 1e12, "a text")

    monkeypatch.setattr(bench_command, "measure_variants", measured)
    assert cli.main(FUSED) == 1
    err = capsys.readouterr().err
    assert "NOT EQUAL" in err
    assert err.splitlines()[-1].startswith("overnight: fused-adamw: ")


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--variants tf32", "tf32.*Ampere"),
        ("--device gpu", "device=gpu"),
        ("--model gpt3-175b", "--rows"),
        (f"--out {__file__}", f"--out {__file__}"),
        ("--data no-such-text", "no-such-text"),
        ("--model tiny --rows 100000000", "--rows"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert cli.main(["bench", "--device", "cpu", *words.split()]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, sentence)


# What is decided.


def test_groups_fit_into_memory_and_share_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch)
    assert plan.groups == [list(plan.tasks)]
    plan = plan_of(16 * GB, monkeypatch)
    assert len(plan.groups) > 1
    for before, after in itertools.pairwise(plan.groups):
        assert before[-1] == after[0]
    assert [*plan.groups[0], *(name for group in plan.groups[1:] for name in group[1:])] == list(plan.tasks)
    for group in plan.groups:
        assert len(group) > 1
        assert memory_of_tasks(plan.tasks[name] for name in group) <= 16 * GB
    for memory, variants in ((5 * GB, None), (1 * GB, ("float32",))):
        with pytest.raises(ValueError, match="--rows"):
            plan_of(memory, monkeypatch, variants=variants)


def test_step_is_larger_only_for_the_variant_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch)
    assert {task.tokens_per_step for task in plan.tasks.values()} == {2 * 1024}
    assert [task.micro_batches for task in plan.tasks.values()] == [*[2] * (len(plan.tasks) - 1), 1]
    alone = plan_of(64 * GB, monkeypatch, variants=("fused-adamw",), rows=3, context_length=256)
    assert (alone.baseline.tokens_per_step, alone.baseline.micro_batches) == (3 * 256, 1)


def test_free_memory_is_at_most_all_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:       3000 kB\n")
    monkeypatch.setattr(decide, "MEMINFO", meminfo)
    assert find_free_bytes("cpu") == 3000 * 1024
    monkeypatch.setattr(decide, "find_memory_bytes", lambda device: 1000)  # a container's limit
    assert find_free_bytes("cpu") == 1000


def test_default_text_is_python_s_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(64 * GB, monkeypatch, model="tiny", variants=("float32",))
    ids, origin = read_ids(plan)  # GPT-2's vocabulary is not in a test's cache
    assert origin == "the bytes of Python's documentation"
    assert len(ids) == plan.tokens_to_read == (WARM_UPS + 3 + 1) * 16 + 1
    assert bytes(ids.astype(np.uint8)).isascii()


def test_short_text_is_repeated_and_another_vocabulary_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"this: {number}")
    out = str(tmp_path / "made")
    prepare_shards(
        PrepareConfig(source=str(tmp_path), tokenizer="characters", out=out, validation_fraction=0.3)
    )
    plan = plan_of(64 * GB, monkeypatch, model="tiny", variants=("float32",), data=out)
    ids, origin = read_ids(plan)
    assert (origin, len(ids)) == (out, plan.tokens_to_read)
    (once,) = (shard.tokens for shard in read_manifest(Path(out)).shards("train"))
    assert (ids[once:] == ids[:-once]).all()
    few = task_of(dataclasses.replace(TINY, vocab_size=5))
    with pytest.raises(ValueError, match="--tokenizer gpt2"):
        read_ids(dataclasses.replace(plan, tasks={"float32": few}))


# The processes.


def test_interruption_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupt(process: StepWorker) -> None:
        os.kill(process.pid, 0)  # it lives
        started.append(process.pid)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepWorker, "receive", interrupt)
    with pytest.raises(KeyboardInterrupt), running_workers({"first": task_of(), "second": task_of()}):
        pass
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    "program, error, words",
    [
        (f"{ANSWER}.send(MemoryError('cuda has too little memory'))", ValueError, "cuda.*fewer --rows"),
        ("import os; os.kill(os.getpid(), 9)", ValueError, "fewer --rows"),
        ("raise SystemExit('no compiler')", ChildProcessError, "(?s)status 1.*no compiler"),
    ],
)
def test_failed_process_is_reported(
    monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(worker, "PROGRAM", program)
    with pytest.raises(error, match=words), running_workers({"bf16": task_of()}):
        pass


def test_process_is_started_with_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "of the user's own")
    assert launcher.environment_of_process(large_pages=True)["GLIBC_TUNABLES"] == launcher.ALLOCATOR
    plain = launcher.environment_of_process(large_pages=False)
    assert "GLIBC_TUNABLES" not in plain
    assert plain["PATH"] == os.environ["PATH"]
