"""Work in units: however the source is divided, and whoever does it, the bytes are the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from overnight.data.atomic_folder import staging_path
from overnight.data.shards import open_tokens, read_manifest
from overnight.preparation import executors, tokenize
from overnight.preparation import prepare as prepare_module
from overnight.preparation.documents import split_of
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

TEXTS = [f"Document {number} of them: " + "word " * (number % 37) for number in range(400)]


def contents(folder: str | Path | None) -> dict[str, bytes]:
    assert folder is not None
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    """A folder of several kinds of file, one text in it twice, far apart."""
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[number * 50 : number * 50 + 50])
        (source / f"{number}.jsonl").write_text(lines)
    (source / "4.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXTS[3]}).encode() + b"\n"))
    table = pyarrow.table({"text": TEXTS[200:]})
    parquet.write_table(table, source / "5.parquet", row_group_size=40)
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        tokenizer="characters",
        validation_fraction=0.2,
        shard_tokens=5000,
        workers=1,
    )


def elsewhere(config: PrepareConfig, name: str, **changes: Any) -> PrepareConfig:
    return dataclasses.replace(config, out=f"{config.out}-{name}", **changes)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 3000)


def test_the_shards_do_not_depend_on_where_the_source_is_cut(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(config)
    assert manifest is not None
    assert (manifest.documents, manifest.duplicate_documents) == (400, 1)
    for unit_bytes in (1, 700, 3000, 20_000):
        monkeypatch.setattr(prepare_module, "UNIT_BYTES", unit_bytes)
        other = elsewhere(config, str(unit_bytes))
        assert prepare(other) == manifest
        assert contents(other.out) == contents(config.out)


def test_a_limit_on_tokens_is_kept_whatever_the_units(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = elsewhere(config, "full", tokens=9000)
    prepare(whole)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 700)
    encoded: list[int] = []
    real = tokenize.tokenize_unit
    monkeypatch.setattr(
        prepare_module,
        "tokenize_unit",
        lambda place, number, threads: encoded.append(number) or real(place, number),
    )
    for per_token in (6, 1 / 20):  # expected too long, and much too short: then more units are asked for
        monkeypatch.setattr(prepare_module, "BYTES_PER_TOKEN_AT_MOST", per_token)
        other = elsewhere(config, f"at-{per_token}", tokens=9000)
        prepare(other)
        assert contents(other.out) == contents(whole.out)
        assert max(encoded) < 60
        encoded.clear()


@pytest.mark.usefixtures("small_units")
def test_processes_write_the_same_bytes(config: PrepareConfig) -> None:
    prepare(config)
    other = elsewhere(config, "processes", workers=8)
    prepare(other)
    assert contents(other.out) == contents(config.out)


def test_what_was_encoded_before_an_interruption_is_not_encoded_again(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tokenize.tokenize_documents, 0

    def stop_at_the_third(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tokenize, "tokenize_documents", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    units = staging_path(Path(config.out or "")) / "units"
    done = {path.name: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert len(done) == 2
    seen: dict[str, int] = {}
    finish = prepare_module.finish

    def look(place: Path) -> Any:
        seen.update({path.name: path.stat().st_mtime_ns for path in (place / "units").glob("*.json")})
        return finish(place)

    monkeypatch.setattr(prepare_module, "finish", look)
    prepare(config)
    assert {name: seen[name] for name in done} == done
    assert len(seen) == 10


@pytest.mark.parametrize(
    "gone",
    [
        *(["wanted"], ["units"], ["layout.json"], ["fates.npy"], ["train-00000.json"], ["work.json"]),
        ["work.json", "units", "wanted", "fates.npy", "layout.json", "so-far.json"],
    ],
)
def test_killed_while_it_clears_up_it_goes_on(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch, gone: list[str]
) -> None:
    """A folder lists what it holds in any order, and so any of it may be the first that is gone."""
    expected = elsewhere(config, "expected")
    prepare(expected)

    def remove_some(place: Path, _shards: Any) -> None:
        for name in gone:
            path = place / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "remove_traces", remove_some)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    monkeypatch.setattr(prepare_module, "tokenize_units", None)  # nothing is done twice
    prepare(config)
    assert contents(config.out) == contents(expected.out)


def test_a_beginning_of_something_else_is_not_gone_on_with(config: PrepareConfig) -> None:
    place = staging_path(Path(config.out or ""))
    (place / "units").mkdir(parents=True)
    (place / "work.json").write_text('{"request": {}}')
    (place / "units" / "00000.json").write_text("{}")
    prepare(config)
    clean = elsewhere(config, "clean")
    prepare(clean)
    assert contents(config.out) == contents(clean.out)


# ---------------------------------------------------------------- damaged files


def test_a_damaged_file_is_named_or_left_out(config: PrepareConfig, small_units: None) -> None:
    source = Path(config.source)
    whole = (source / "4.jsonl.gz").read_bytes()
    (source / "4.jsonl.gz").write_bytes(whole[:-9])
    (source / "5.parquet").write_bytes((source / "5.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"5\.parquet is damaged or is not a Parquet file"):
        prepare(config)
    assert not Path(config.out or "").exists()
    skipping = dataclasses.replace(config, on_bad_file="skip")
    manifest = prepare(skipping)
    assert manifest is not None
    assert (manifest.documents, manifest.damaged_files) == (200, 2)
    (source / "5.parquet").unlink()
    with pytest.raises(ValueError, match=r"4\.jsonl\.gz is damaged: "):
        prepare(elsewhere(config, "again"))
    parallel = elsewhere(skipping, "parallel", workers=8)
    assert getattr(prepare(parallel), "damaged_files", None) == 1


# ---------------------------------------------------------------- workers that die


def die_once(place: Path, rank: int, ranks: int, threads: int = 1) -> None:
    """A step whose third rank kills its process, but only the first time."""
    mark = place / "died"
    if rank == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    prepare_module.encode(place, rank, ranks)


def test_a_killed_worker_ends_the_run_which_then_goes_on(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = elsewhere(config, "expected")
    prepare(expected)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize_units", die_once)
        with pytest.raises(
            ChildProcessError, match=r"a worker was killed, .*fewer --workers, and run the same"
        ):
            prepare(dataclasses.replace(config, workers=8))
    assert not Path(config.out or "").exists()
    prepare(dataclasses.replace(config, workers=8))
    assert contents(config.out) == contents(expected.out)


WAIT_FOREVER = """
import sys, time
from pathlib import Path
from overnight.data.executors import run_step
from overnight.data.request import PrepareConfig

def wait(place, rank, ranks):
    (place / f"at-work-{rank}").touch()
    time.sleep(600)

if __name__ == "__main__":
    run_step(wait, Path(sys.argv[1]), 2, PrepareConfig(source="text", workers=8))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_they_work_for(tmp_path: Path, number: int) -> None:
    """Whatever ends it; or they would write beside whoever goes on with the work."""
    (tmp_path / "wait.py").write_text(WAIT_FOREVER)
    words = [sys.executable, str(tmp_path / "wait.py"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as command:
        while len([*tmp_path.glob("at-work-*")]) < 2:
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(number)
        command.communicate(timeout=60)  # ends when nobody holds the pipe any more
    assert command.returncode == -number


def test_several_workers_need_datatrove(
    config: PrepareConfig, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datatrove.executor.local", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[data\]', or give --workers 1"):
        prepare(dataclasses.replace(config, workers=8))


# ---------------------------------------------------------------- clusters

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
    """A stand-in for Slurm, which runs each array at once, one task after the other; the scripts it got."""
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    names = {"python": sys.executable, "jobs": str(jobs), "log": str(tmp_path / "log")}
    scripts = {
        "sbatch": SBATCH.replace("{python}", names["python"])
        .replace("{jobs!r}", repr(names["jobs"]))
        .replace("{log!r}", repr(names["log"])),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod((programs / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return jobs


def test_slurm_writes_the_same_bytes(config: PrepareConfig, small_units: None, sbatch: Path) -> None:
    prepare(config)
    slurm = elsewhere(config, "slurm", executor="slurm", tasks=3, slurm_partition="cpu", workers=None)
    assert prepare(slurm) is None
    log = sbatch.parent / "log"
    assert Path(slurm.out or "").is_dir(), log.read_text()[-3000:]
    assert prepare(slurm) == read_manifest(Path(slurm.out or ""))  # the same command finds it complete
    assert contents(slurm.out) == contents(config.out)
    scripts = [path.read_text() for path in sorted(sbatch.iterdir(), key=lambda path: int(path.name))]
    arrays = [script for script in scripts if "launch_pickled_pipeline" in script]
    assert [next(word for word in script.split() if word.startswith("--array")) for script in arrays] == [
        "--array=0-2",
        "--array=0-0",
        "--array=0-2",
        "--array=0-0",
    ]
    assert all("--partition=cpu" in script for script in arrays)
    assert all("--dependency=afterok:" in script.splitlines()[0] for script in arrays[1:])


def test_what_slurm_is_at_is_not_handed_to_it_again(
    config: PrepareConfig, small_units: None, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs that write one unit would write into each other's file."""
    slurm = dataclasses.replace(config, executor="slurm", slurm_partition="cpu", workers=None)
    queue = sbatch.parent / "programs" / "squeue"
    (sbatch.parent / "programs" / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 17\n")
    queue.write_text('#!/bin/bash\n[[ "$*" == *17* ]] && echo 17 cpu overnight\n')
    queue.chmod(0o755)
    assert prepare(slurm) is None
    assert "handed to Slurm" in capsys.readouterr().err
    assert prepare(slurm) is None
    err = capsys.readouterr().err
    assert "Slurm is at it already: see squeue --jobs 17" in err
    assert "handed to Slurm" not in err
    queue.write_text("#!/bin/bash\nexit 0\n")  # it has failed, or was cancelled
    prepare(slurm)
    assert "handed to Slurm" in capsys.readouterr().err


def test_jobs_that_sbatch_refuses_are_a_sentence(
    config: PrepareConfig, small_units: None, sbatch: Path
) -> None:
    (sbatch.parent / "programs" / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2\nexit 1\n")
    slurm = dataclasses.replace(config, executor="slurm", slurm_partition="gone", workers=None)
    with pytest.raises(ValueError, match=r"sbatch refused the jobs \(exit status 1\)"):
        prepare(slurm)


def test_slurm_needs_sbatch_and_a_partition(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = dataclasses.replace(config, executor="slurm", workers=None)
    with pytest.raises(ValueError, match="executor=slurm needs slurm_partition"):
        prepare(slurm)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs sbatch, which is not on this machine"):
        prepare(dataclasses.replace(slurm, slurm_partition="cpu"))


ON_RAY = """
import sys
from overnight.data import prepare
if __name__ == "__main__":
    prepare.UNIT_BYTES = 3000
    options = dict(tokenizer="characters", validation_fraction=0.2, shard_tokens=5000)
    prepare.prepare(
        prepare.PrepareConfig(
            source=sys.argv[1], out=sys.argv[2], executor="ray", tasks=2, workers=2, **options
        )
    )
"""


@pytest.mark.slow
def test_ray_writes_the_same_bytes(config: PrepareConfig, small_units: None, tmp_path: Path) -> None:
    """In a process of its own: Ray warns of much, and a warning is an error here."""
    prepare(config)
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    out = f"{config.out}-ray"
    command = [sys.executable, str(tmp_path / "on_ray.py"), config.source, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(config.out)


def test_how_many_work_at_once(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "count_cores", lambda: 5)
    assert executors.count_workers(dataclasses.replace(config, workers=None)) == 5
    assert executors.count_workers(dataclasses.replace(config, workers=3)) == 3
    for workers, ranks, processes, threads in (
        (1, 9, 1, 1),
        (4, 9, 1, 4),
        (8, 9, 2, 4),
        (64, 9, 9, 7),
        (9, 1, 1, 9),
    ):
        asked = dataclasses.replace(config, workers=workers)
        assert executors.count_prepare_processes(asked, ranks) == processes
        assert executors.count_threads(asked, ranks) == threads
    assert executors.count_threads(dataclasses.replace(config, workers=8, executor="ray"), 9) == 1


# ---------------------------------------------------------------- a real corpus


def documents_of(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of one split, decoded from its shards."""
    manifest = read_manifest(folder)
    ids = np.concatenate([open_tokens(folder / shard.name) for shard in manifest.shards(split)])
    starts = np.flatnonzero(ids == tokenizer.end_of_text)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


def test_decoded_shards_are_the_documents(shared_data: Path, tmp_path: Path) -> None:
    """And there are as many tokens as the corpus says of each document, and one more for each."""
    path, bpe = shared_data / "corpus" / "validation.parquet", shared_data / "gpt2-bpe"
    out = tmp_path / "out"
    config = PrepareConfig(
        source=str(path), out=str(out), tokenizer=str(bpe), validation_fraction=0.1, shard_tokens=50_000
    )
    manifest = prepare(config)
    assert manifest is not None
    table = parquet.read_table(path, columns=["text", "token_count"])
    texts, counts = (table.column(name).to_pylist() for name in ("text", "token_count"))
    assert manifest.tokens("train") + manifest.tokens("validation") == sum(counts) + len(texts)
    tokenizer = load_tokenizer(bpe)
    for split in ("train", "validation"):
        expected = [text for text in texts if split_of(text, 0.1) == split]
        assert documents_of(out, split, tokenizer) == expected
