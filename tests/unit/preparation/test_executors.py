"""However the source is divided, and whoever does the work, the bytes are the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from overnight.data.atomic_folder import staging_path
from overnight.data.shards import read_manifest
from overnight.data.text_files import find_files
from overnight.preparation import executors, tokenize
from overnight.preparation import prepare as prepare_module
from overnight.preparation.documents import divide_file, split_of
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig

TEXTS = [f"Document {number} of them: " + "word " * (number % 37) for number in range(400)]


@pytest.fixture
def config(make_config: Any) -> PrepareConfig:
    """A folder of several kinds of file, with one text twice, far apart."""
    config = make_config(TEXTS[:200], files=4, shard_tokens=5000)
    source = Path(config.source)
    (source / "4.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXTS[3]}).encode() + b"\n"))
    parquet.write_table(pyarrow.table({"text": TEXTS[200:]}), source / "5.parquet", row_group_size=40)
    return config


def elsewhere(config: PrepareConfig, name: str, **changes: Any) -> PrepareConfig:
    return dataclasses.replace(config, out=f"{config.out}-{name}", **changes)


@pytest.mark.parametrize(
    "options",
    [{}, {"near_duplicates": "drop"}, {"decontaminate": ("b.jsonl",), "on_contaminated": "drop"}],
    ids=["plain", "near-duplicates", "contaminated"],
)
def test_shards_do_not_depend_on_units_or_workers(
    config: PrepareConfig, write_texts: Any, contents: Any, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    monkeypatch.chdir(Path(config.source).parent)
    write_texts(Path("b.jsonl"), [TEXTS[36], TEXTS[100]])
    config = dataclasses.replace(config, **options)
    manifest = prepare_shards(config)
    assert (manifest.documents == 400) == (not options)
    assert manifest.duplicate_documents == 1
    for unit_bytes, characters, workers in ((1, 1, 1), (700, 500, 3), (3000, 3000, 8)):
        monkeypatch.setattr(prepare_module, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", characters)
        other = elsewhere(config, str(unit_bytes), workers=workers)
        assert prepare_shards(other) == manifest
        assert contents(other.out) == contents(config.out)


def test_tokens_limit_does_not_depend_on_the_units(
    config: PrepareConfig, contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = elsewhere(config, "full", tokens=9000)
    prepare_shards(whole)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 700)
    tokenized: list[int] = []
    real = tokenize.tokenize_unit
    monkeypatch.setattr(tokenize, "tokenize_unit", lambda *given: tokenized.append(given[2]) or real(*given))
    for per_token in (6, 1 / 20):  # expected too long, and much too short: then more units are tokenized
        monkeypatch.setattr(prepare_module, "BYTES_PER_TOKEN_AT_MOST", per_token)
        other = elsewhere(config, f"at-{per_token}", tokens=9000)
        prepare_shards(other)
        assert contents(other.out) == contents(whole.out)
        assert max(tokenized) < 60
        tokenized.clear()


def test_interrupted_units_are_kept(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tokenize.tokenize_documents, []

    def stop_at_the_fourth(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(tokenize, "tokenize_documents", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(config)
    units = staging_path(Path(config.out)) / "units"
    assert len(list(units.glob("*.json"))) == 2  # the first call was for the estimate of the disk space
    prepare_shards(config)
    assert len(calls) == 4 + (10 - 2)  # of ten units


@pytest.mark.parametrize(
    "gone",
    [
        *(["wanted"], ["units"], ["layout.json"], ["splits.npy"], ["train-00000.json"], ["work.json"]),
        ["work.json", "units", "wanted", "splits.npy", "layout.json", "so-far.json"],
    ],
)
def test_killed_while_it_clears_up_it_continues(
    config: PrepareConfig, contents: Any, small_units: None, monkeypatch: pytest.MonkeyPatch, gone: list[str]
) -> None:
    """A folder lists its files in any order, so any of them may be the first that is gone."""
    expected = elsewhere(config, "expected")
    prepare_shards(expected)

    def remove_some(staging: Path, _shards: Any) -> None:
        for path in (staging / name for name in gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "remove_traces", remove_some)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config)
    monkeypatch.setattr(tokenize, "tokenize_units", None)  # nothing is done twice
    prepare_shards(config)
    assert contents(config.out) == contents(expected.out)


@pytest.mark.parametrize("content", ['{"request": {}}', "{", "[]"])
def test_beginning_of_something_else_is_not_continued(
    config: PrepareConfig, contents: Any, content: str
) -> None:
    staging = staging_path(Path(config.out))
    (staging / "units").mkdir(parents=True)
    (staging / "work.json").write_text(content)
    (staging / "units" / "00000.json").write_text("{}")
    prepare_shards(config)
    clean = elsewhere(config, "clean")
    prepare_shards(clean)
    assert contents(config.out) == contents(clean.out)


def test_damaged_file_is_named_or_left_out(config: PrepareConfig, small_units: None) -> None:
    source = Path(config.source)
    for name, lost in (("4.jsonl.gz", 9), ("5.parquet", 40)):
        (source / name).write_bytes((source / name).read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"5\.parquet is damaged .*--on-bad-file"):
        prepare_shards(config)
    assert not Path(config.out).exists()
    skipping = dataclasses.replace(config, on_bad_file="skip")
    manifest = prepare_shards(skipping)
    assert (manifest.documents, manifest.damaged_files) == (200, 2)
    (source / "5.parquet").unlink()
    with pytest.raises(ValueError, match=r"4\.jsonl\.gz is damaged"):
        prepare_shards(elsewhere(config, "again"))
    parallel = elsewhere(skipping, "parallel", workers=8)
    assert getattr(prepare_shards(parallel), "damaged_files", None) == 1


# Workers that die


def die_once(staging: Path, rank: int, ranks: int, threads: int = 1) -> None:
    """A step whose third rank kills its process, but only the first time."""
    mark = staging / "died"
    if rank == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    tokenize.tokenize_units(staging, rank, ranks)  # in another process, which is not patched


def test_killed_worker_ends_the_command_which_then_continues(
    config: PrepareConfig, contents: Any, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = elsewhere(config, "expected")
    prepare_shards(expected)
    parallel = dataclasses.replace(config, workers=8)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "tokenize_units", die_once)
        with pytest.raises(ChildProcessError, match="--workers"):
            prepare_shards(parallel)
    assert not Path(config.out).exists()
    prepare_shards(parallel)
    assert contents(config.out) == contents(expected.out)


def test_error_of_a_worker_is_raised_once(
    config: PrepareConfig, small_units: None, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare_shards(config)
    (Path(config.source) / "2.jsonl").write_bytes(b'{"text": "\xff"}\n')
    other = elsewhere(config, "bad", workers=8, tokenizer=f"{config.out}/tokenizer")
    with pytest.raises(ValueError, match=r"2\.jsonl line 1 is not UTF-8"):
        prepare_shards(other)
    assert "Traceback" not in capfd.readouterr().err


WAIT_FOREVER = """
import sys, time
from pathlib import Path
from overnight.preparation.executors import run_step
from overnight.preparation.prepare_config import PrepareConfig

def wait(staging, rank, ranks):
    (staging / f"at-work-{rank}").touch()
    time.sleep(600)

if __name__ == "__main__":
    run_step(wait, Path(sys.argv[1]), 2, PrepareConfig(source="text", workers=8))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    """However it ends; or they would write beside the command that continues the work."""
    (tmp_path / "wait.py").write_text(WAIT_FOREVER)
    words = [sys.executable, str(tmp_path / "wait.py"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as command:
        while len([*tmp_path.glob("at-work-*")]) < 2:
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(number)
        command.communicate(timeout=60)  # ends when no worker holds the pipe any more
    assert command.returncode == -number


# Clusters

SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.stdin.read() if sys.argv[-1] == "-" else open(sys.argv[-1]).read()
last = re.search(r"--array=0-(\\d+)", script)
number = len(os.listdir({jobs!r})) + 1
open(os.path.join({jobs!r}, str(number)), "w").write(" ".join(sys.argv[1:]) + "\\n" + script)
for task in range(int(last[1]) + 1) if last else []:
    variables = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    open({log!r}, "a").write(done.stdout + done.stderr)
print("Submitted batch job", number)
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm that runs each array at once, task after task; the folder of its scripts."""
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, jobs=str(jobs), log=str(tmp_path / "log")),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "squeue": "#!/bin/bash\nexit 0\n",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return jobs


def test_slurm_writes_the_same_bytes(
    config: PrepareConfig, contents: Any, small_units: None, sbatch: Path
) -> None:
    prepare_shards(config)
    slurm = elsewhere(config, "slurm", executor="slurm", tasks=3, slurm_partition="cpu", workers=None)
    assert prepare_shards(slurm) is None
    log = sbatch.parent / "log"
    assert Path(slurm.out).is_dir(), log.read_text()[-3000:]
    assert prepare_shards(slurm) == read_manifest(Path(slurm.out))  # the same command finds it complete
    assert contents(slurm.out) == contents(config.out)
    scripts = [path.read_text() for path in sorted(sbatch.iterdir(), key=lambda path: int(path.name))]
    arrays = [script for script in scripts if "launch_pickled_pipeline" in script]
    sizes = [next(word for word in script.split() if word.startswith("--array")) for script in arrays]
    assert sizes == ["--array=0-2", "--array=0-0", "--array=0-2", "--array=0-0"]
    assert all("--partition=cpu" in script for script in arrays)
    assert all("--dependency=afterok:" in script.splitlines()[0] for script in arrays[1:])


def test_work_in_slurm_is_not_submitted_again(
    config: PrepareConfig, small_units: None, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs that tokenize one unit would write into each other's file."""
    slurm = dataclasses.replace(config, executor="slurm", slurm_partition="cpu", workers=None)
    calls, programs = sbatch.parent / "calls", sbatch.parent / "programs"
    (programs / "sbatch").write_text(f"#!/bin/bash\necho . >> {calls}\necho Submitted batch job 17\n")
    (programs / "squeue").write_text('#!/bin/bash\n[[ "$*" == *17* ]] && echo 17 cpu overnight\n')
    assert prepare_shards(slurm) is None
    submitted = calls.read_text()
    assert prepare_shards(slurm) is None
    assert calls.read_text() == submitted
    assert "squeue --jobs 17" in capsys.readouterr().err
    (programs / "squeue").write_text("#!/bin/bash\nexit 0\n")  # it has failed, or was cancelled
    assert prepare_shards(slurm) is None
    assert calls.read_text() == 2 * submitted


def test_slurm_needs_sbatch_and_a_partition_it_accepts(
    config: PrepareConfig, small_units: None, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sbatch.parent / "programs" / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2\nexit 1\n")
    slurm = dataclasses.replace(config, executor="slurm", workers=None, slurm_partition="gone")
    with pytest.raises(ValueError, match=r"sbatch .*exit status 1.*slurm_partition"):
        prepare_shards(slurm)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="sbatch"):
        prepare_shards(slurm)


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_clusters_need_datatrove(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, executor: Any
) -> None:
    monkeypatch.setitem(sys.modules, f"datatrove.executor.{executor}", None)
    with pytest.raises(ValueError, match=r"'overnight\[data\]'"):
        prepare_shards(dataclasses.replace(config, executor=executor, slurm_partition="cpu"))
    prepare_shards(dataclasses.replace(config, workers=8))  # as many processes of this machine do not


ON_RAY = """
import sys
from overnight.preparation import prepare
from overnight.preparation.prepare_config import PrepareConfig
if __name__ == "__main__":
    prepare.UNIT_BYTES = 3000
    options = dict(tokenizer="characters", validation_fraction=0.2, shard_tokens=5000)
    prepare.prepare_shards(
        PrepareConfig(source=sys.argv[1], out=sys.argv[2], executor="ray", tasks=2, workers=2, **options)
    )
"""


@pytest.mark.slow
def test_ray_writes_the_same_bytes(
    config: PrepareConfig, contents: Any, small_units: None, tmp_path: Path
) -> None:
    """In a process of its own: Ray warns of much, and a warning is an error here."""
    prepare_shards(config)
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    out = f"{config.out}-ray"
    command = [sys.executable, str(tmp_path / "on_ray.py"), config.source, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(config.out)


@pytest.mark.parametrize(
    "workers,items,divided",
    [(None, 9, (2, 2)), (1, 9, (1, 1)), (4, 9, (1, 4)), (8, 9, (2, 4)), (64, 9, (9, 7)), (9, 1, (1, 9))],
)
def test_workers_are_divided_into_processes_and_threads(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, items: int, divided: tuple[int, int]
) -> None:
    monkeypatch.setattr(executors, "count_cores", lambda: 5)
    assert executors.divide_workers(PrepareConfig(workers=workers), items) == divided
    assert executors.divide_workers(PrepareConfig(workers=workers, executor="ray"), items)[1] == 1


def test_decoded_shards_are_the_documents(shared_data: Path, tmp_path: Path, texts_in: Any) -> None:
    """A real corpus: as many tokens as it says of each document, and one separator for each."""
    path = shared_data / "corpus" / "validation.parquet"
    config = PrepareConfig(
        source=str(path),
        out=str(tmp_path / "out"),
        tokenizer=str(shared_data / "gpt2-bpe"),
        validation_fraction=0.1,
        shard_tokens=50_000,
    )
    manifest = prepare_shards(config)
    table = parquet.read_table(path, columns=["text", "token_count"])
    texts, counts = (table.column(name).to_pylist() for name in ("text", "token_count"))
    assert manifest.tokens("train") + manifest.tokens("validation") == sum(counts) + len(texts)
    for split, found in texts_in(config).items():
        assert found == [text for text in texts if split_of(text, 0.1) == split]
    (file,) = find_files(str(path))
    (estimate,) = divide_file(file, "text", 1 << 40).values()
    assert 0.5 < estimate / sum(len(text.encode()) for text in texts) < 1.5
