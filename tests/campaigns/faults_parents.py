"""C12: kill -9 of any process of a job ends all of it; a run is saved where that is possible, and goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from faults_crashes import newest_whole
from faults_kills import ENDLESS, count_lines
from faults_trials import RUN, WRONG_USE, Place, find_difference, record, report, train
from report import Report

SECONDS_TO_END = 10.0
TRAINING = ["train", "small.toml", "--processes", "2"]
PREPARATION = ["prepare", "text", "--tokenizer", "bpe-300", "--out", "shards", "--workers", "8"]
SETTINGS: dict[str, object] = {"steps": 600, "save": 50, "evaluate": 200, "keep": 1}
VICTIMS = ("launcher", "rank 0", "rank 1", "preparation", "a worker of it")
MARK = "OVERNIGHT_CAMPAIGN"  # a variable that every process of a job inherits
# A mutant: it is imported by every process of the job.
UNWATCHED = "from overnight.distributed import launcher\nlauncher.end_with_parent = lambda *_, **__: None\n"


class Job:
    """A command in a folder, with its processes."""

    def __init__(self, folder: Path, words: list[str], path: str = "") -> None:
        self.mark = f"{MARK}={folder}"
        path = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
        self.main = subprocess.Popen(
            [sys.executable, "-m", "overnight", *words],
            cwd=folder,
            env={**os.environ, MARK: str(folder), "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def processes(self) -> dict[int, str]:
        """The job's processes that have not ended: what each of them is, by its id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended, or belongs to another user
                continue
            if self.mark in variables:
                rank = [f"rank {each[5:]}" for each in variables if each.startswith("RANK=")]
                is_worker = b"spawn_main" in command
                found[int(folder.name)] = "a worker of it" if is_worker else rank[0] if rank else "other"
        if self.main.poll() is None:
            found[self.main.pid] = "main"
        return found

    def find(self, victim: str) -> int | None:
        """The process to be killed; waits until it exists. None if the job is done before."""
        wanted = "main" if victim in {"launcher", "preparation"} else victim
        while self.main.poll() is None:
            named = [process for process, role in self.processes().items() if role == wanted]
            if named:
                return named[0]
            time.sleep(0.01)
        return None

    def seconds_to_end(self) -> float | None:
        """How long it takes until no process is left; None if some are left after SECONDS_TO_END."""
        begun_at = time.monotonic()
        while self.processes():
            if time.monotonic() - begun_at > SECONDS_TO_END:
                return None
            time.sleep(0.05)
        return time.monotonic() - begun_at

    def kill_all(self) -> None:
        """End what is left."""
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.main.wait()


def new_job_folder(place: Place, name: str, **settings: object) -> Path:
    """A folder with a recipe, and a text that takes some seconds to prepare."""
    folder = place.new(name, **settings)
    (folder / "text").mkdir()
    for number in range(40):
        words = (f"Line {line} of {number} tells of {line * number % 997}.\n" for line in range(20_000))
        (folder / "text" / f"{number:02}.txt").write_text("".join(words))
    return folder


def measure_peace(place: Place) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of either command when it is left alone, and the record of the run."""
    folder, seconds = new_job_folder(place, "peace", **SETTINGS), {}
    for words in (TRAINING, PREPARATION):
        begun_at = time.monotonic()
        if status := Job(folder, words).main.wait():
            raise ValueError(f"{' '.join(words)} ended with status {status}")
        seconds[words[0]] = time.monotonic() - begun_at
    return seconds, record(folder)


def kill_one(place: Place, victim: str, moment: float, expected: dict[str, Any]) -> tuple[float, bool] | None:
    """Seconds until all have ended, and whether a step was saved after the kill; None if it was done before.

    Raises ValueError if a process is left, or the same job does not come to its end afterwards.
    """
    folder = new_job_folder(place, f"killed-{time.monotonic_ns()}", **SETTINGS)
    is_training = victim in VICTIMS[:3]
    job = Job(folder, TRAINING if is_training else PREPARATION)
    time.sleep(moment)
    process = job.find(victim)
    if process is None:
        return None
    os.kill(process, signal.SIGKILL)
    seconds = job.seconds_to_end()
    if seconds is None:
        left = job.processes()
        job.kill_all()
        raise ValueError(f"kill -9 of {victim} after {moment:.1f} s leaves {left}")
    job.main.wait()
    lines = count_lines(folder)
    is_saved = victim == "launcher" and lines > 0
    if is_saved and newest_whole(folder) != lines:
        raise ValueError(f"checkpoint {newest_whole(folder)} is the newest after {lines} steps")
    if not is_training:
        if Job(folder, PREPARATION).main.wait():
            raise ValueError(f"the preparation does not go on after kill -9 of {victim}")
    else:
        is_begun = (folder / RUN / "recipe.toml").is_file()
        words = ["train", "--resume", str(RUN)] if is_begun else TRAINING
        status = Job(folder, words).main.wait()
        if status or (wrong := find_difference(folder, expected)):
            raise ValueError(f"after kill -9 of {victim}: {f'status {status}' if status else wrong}")
    shutil.rmtree(folder)
    return seconds, is_saved


def leave_unwatched(place: Place) -> int:
    """Number of processes of the mutant that train on; a second command names the one that has the lock.

    Raises ValueError if none do, or it is not named.
    """
    folder = place.new("unwatched", **ENDLESS)
    (folder / "sitecustomize.py").write_text(UNWATCHED)
    job = Job(folder, TRAINING, str(folder))
    while count_lines(folder) < 5 and job.main.poll() is None:
        time.sleep(0.05)
    (holder,) = [process for process, role in job.processes().items() if role == "rank 0"]
    job.main.kill()
    job.main.wait()
    try:
        if job.seconds_to_end() is not None:
            raise ValueError("without a watch the processes end as well: the campaign proves nothing")
        refused, name = train(folder), f"process {holder} on {socket.gethostname()}"
        if refused.status != WRONG_USE or name not in refused.said:
            raise ValueError(f"{name} has the lock, and is not named: {refused.said}")
        return len(job.processes())
    finally:
        job.kill_all()


def measure_parents(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """C12. Raises ValueError if a process is left, or a run or a preparation is lost."""
    draw, killed = random.Random(seed), list[str]()
    seconds: list[float] = []
    saved = 0
    durations, expected = measure_peace(place)
    while len(killed) < counts["parents"]:
        victim = VICTIMS[len(killed) % len(VICTIMS)]
        duration = durations["train" if victim in VICTIMS[:3] else "prepare"]
        found = kill_one(place, victim, draw.uniform(0, duration), expected)
        if found is not None:
            killed.append(victim)
            seconds.append(found[0])
            saved += found[1]
    of_all = f"{len(killed)}/{len(killed)}"
    rows = [[f"kill -9 of {victim}", str(killed.count(victim))] for victim in VICTIMS]
    return report(
        title="C12: kill -9 of any process of a job",
        rows=[
            *rows,
            ["no process of the job left within 10 s", of_all],
            ["seconds until then, the longest", f"{max(seconds):.1f}"],
            ["launchers killed after the first step: that step's checkpoint is there", f"{saved}/{saved}"],
            ["continued to the end; runs in the same bits", of_all],
            [
                "control, a mutant that does not watch its parent: left after 10 s",
                str(leave_unwatched(place)),
            ],
            ["the second command on a run that is held names process and host of the holder", "1/1"],
        ],
        measured={"seconds": seconds, "killed": killed},
        settings={"seed": seed},
    )
