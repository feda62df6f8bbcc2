"""What becomes of a run in several processes: whether it is the same, what it survives, what talking costs.

    python benchmarks/distributed.py --figures FOLDER
    python benchmarks/distributed.py --parts kills frozen --kills 2 --frozen 1

Everything is asked of the command itself, on a CPU, with a small model on Python's documentation. The
parts are equality, kills, frozen and communication. With --figures each part's table is written to
FOLDER/PART.md, for tools/figures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import measure
from overheard import Talk, read_notes
from teams import (
    TEAMS,
    count_lines,
    digest,
    newest,
    overnight,
    prepare,
    read_lines,
    send,
    started,
    train,
    train_in_team,
    wait_for,
    wait_until,
)

HERE = Path(__file__).parent
PARTS = ("equality", "kills", "frozen", "communication")
TIMEOUT_SECONDS = 5
FROZEN = 70  # the exit status of a process that made no progress
LARGER = ("--n-layer", "4", "--n-embd", "256", "--n-head", "4", "--context-length", "256")
LARGER_STEP = ("--tokens-per-step", "4096", "--evaluate-every-steps", "1000", "--sample-every-steps", "1000")

# Found by every Python of a run: told by a signal, a process sleeps for ever where it stands.


# ---------------------------------------------------------------- equality


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two losses of the same step, relative to them."""
    return max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True))


def compare_weights(ours: Path, theirs: Path) -> float:
    """The largest difference between two models' weights; 0.0 says that they are equal to the bit."""
    from overnight.training.checkpoint.load import read_model

    mine, other = (read_model(newest(run)).weights() for run in (ours, theirs))
    return max(float((mine[name] - other[name]).abs().max()) for name in other)


def measure_equality(folder: Path, options: argparse.Namespace) -> measure.Report:
    """Compare each run in several processes with one process; deterministic runs must be bitwise equal."""
    alone = train(folder, "alone")
    alone_bitwise = train(folder, "alone-deterministic_reduce", "--deterministic-reduce")
    losses = [line["loss"] for line in read_lines(alone / "metrics.jsonl")]
    rows, measured = [], {}
    for team in TEAMS:
        run = train_in_team(folder, team)
        found = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
        early, late = (largest_difference(found[:step], losses[:step]) for step in (20, len(losses)))
        bits = "cannot"
        if team.sharding in {"none", "zero1"}:
            deterministic_reduce = train_in_team(folder, team, "--deterministic-reduce")
            bits = "equal" if compare_weights(deterministic_reduce, alone_bitwise) == 0 else "DIFFERENT"
        weights = compare_weights(run, alone)
        shown = [f"{difference:.1e}" if difference else "0" for difference in (early, late, weights)]
        rows.append([team.name(), *shown, bits])
        measured[team.name()] = [early, late, weights, bits]
    return measure.Report(
        title="The same run",
        headings=(
            *("processes and sharding", "loss, 20 steps", f"loss, {options.steps} steps"),
            *("weights", f"weights after {options.steps} steps, deterministic"),
        ),
        rows=rows,
        measured=measured,
        notes=[
            "Compared with one process: the largest relative difference of a step's loss, and the largest "
            "difference of a weight at the end. Deterministic: with `--deterministic-reduce`."
        ],
    )


# ---------------------------------------------------------------- processes that die and freeze


class Kill(NamedTuple):
    """A run one of whose processes was killed."""

    seconds: float
    """From then to the end of the command."""
    by_itself: bool
    """Whether the run came to its end without being resumed."""


def kill(folder: Path, name: str, rank: int, moment: float, restarts: int) -> Kill | None:
    """Train, kill, and resume if need be; None if the run was done before that moment.

    Raises ValueError if the run can't be resumed.
    """
    command = [*overnight(), "train", "recipe.toml", "--run-name", name, "--processes", "2"]
    with started(folder, [*command, "--max-restarts", str(restarts)]) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
            return None
        try:
            since = send(process, rank, signal.SIGKILL)
        except ValueError:
            if process.poll() == 0:  # it was done while the process to be killed was looked for
                return None
            raise
        ended = wait_for(process, since)
    if ended.status == 0:
        return Kill(ended.seconds, by_itself=True)
    is_begun = (folder / "runs" / name / "recipe.toml").is_file()
    again = [*overnight(), "train", "--resume", f"runs/{name}"] if is_begun else command
    with started(folder, again) as process:
        resumed = wait_for(process)
    if resumed.status != 0:
        raise ValueError(f"{name} can't be resumed: {resumed.said}")
    return Kill(ended.seconds, by_itself=False)


def measure_kills(folder: Path, options: argparse.Namespace) -> measure.Report:
    """A random one of two processes is killed at a random moment, repeatedly: the run must stay the same.

    Every other run may be begun anew by itself; the rest is resumed by the command that is proposed. Raises
    ValueError if one differs.
    """
    draw = random.Random(options.seed)
    began = time.monotonic()
    expected = digest(train(folder, "peace", "--processes", "2"))
    seconds = time.monotonic() - began
    kills: list[Kill] = []
    for number in range(100 * options.kills):
        name, rank, moment = f"killed-{number}", draw.randrange(2), draw.uniform(0, seconds)
        killed = kill(folder, name, rank, moment, restarts=len(kills) % 2)
        if digest(folder / "runs" / name) != expected:
            raise ValueError(f"{name}, rank {rank} after {moment:.2f} s: differs from the uninterrupted run")
        kills += [killed] if killed else []
        if len(kills) == options.kills:
            break
    by_itself = sum(each.by_itself for each in kills)
    ends = [each.seconds for each in kills if not each.by_itself]
    return measure.Report(
        title="Killed processes",
        headings=("what", "count"),
        rows=[
            ["kills (SIGKILL) of a random one of two processes at a random moment", str(len(kills))],
            ["runs that finished by themselves (--max-restarts 1)", str(by_itself)],
            ["runs that were resumed", str(len(kills) - by_itself)],
            ["equal to the uninterrupted run, to the bit", f"{len(kills)}/{options.kills}"],
            ["seconds from the kill to the end of the command: median", measure.spread(ends, 1)[0]],
            ["the longest of them", measure.spread(ends, 1)[2]],
        ],
        measured={"kills": [each._asdict() for each in kills]},
        settings={"seed": options.seed, "sha256": expected[:16]},
    )


def measure_frozen(folder: Path, options: argparse.Namespace) -> measure.Report:
    """A random process hangs at a random step: the run must end, and tell where all stand.

    Raises ValueError if one does not.
    """
    draw = random.Random(options.seed)
    ends = []
    for number in range(options.frozen):
        name, rank, step = f"frozen-{number}", draw.randrange(2), draw.randrange(1, options.steps // 2)
        command = [*overnight(), "train", "recipe.toml", "--run-name", name, "--processes", "2"]
        with started(folder, [*command, "--timeout-seconds", str(TIMEOUT_SECONDS)]) as process:
            wait_until(process, lambda: count_lines(folder / "runs" / name) >= step)  # noqa: B023 - called at once
            frozen_at = send(process, rank, signal.SIGUSR2)
            ended = wait_for(process, frozen_at)
        told = all(f"rank {each} made no progress" in ended.said for each in range(2))
        if ended.status != FROZEN or not told or "in freeze" not in ended.said:
            raise ValueError(f"rank {rank}, frozen at step {step}, was not reported: {ended.said}")
        ends.append(ended.seconds)
    total = options.frozen
    median, _, longest = measure.spread(ends, 1)
    return measure.Report(
        title="Processes that make no progress",
        headings=("what", "count"),
        rows=[
            ["a random one of two processes hangs at a random step", str(total)],
            ["runs that ended, with the stacks of both", f"{total}/{total}"],
            [f"seconds until then, with --timeout-seconds {TIMEOUT_SECONDS}: median", median],
            ["the longest of them", longest],
        ],
        measured={"seconds": ends},
        settings={"seed": options.seed},
    )


# ---------------------------------------------------------------- cost of communication


WAYS = (("none",), ("none", "--deterministic-reduce"), ("zero1",), ("fsdp",))


def listen_to(folder: Path, processes: int, way: Sequence[str], steps: int) -> list[Talk]:
    """What each step of a larger model spends on the others. Raises ValueError if the run fails."""
    name = f"heard-{processes}-{'-'.join(way)}"
    notes = folder / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), str(HERE / "overheard.py"), str(notes), "train", "recipe.toml"]
    command += ["--run-name", name, "--sharding", *way, *LARGER, *LARGER_STEP]
    with started(folder, [*command, "--total-steps", str(steps), "--warmup-steps", "1"]) as process:
        ended = wait_for(process)
    if ended.status != 0:
        raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return read_notes(notes, processes)


def measure_talk(folder: Path, options: argparse.Namespace) -> measure.Report:
    """Measure by number of processes and sharding."""
    rows, measured = [], {}
    for processes in (2, 4):
        for way in WAYS:
            talks = listen_to(folder, processes, way, options.heard_steps)
            name = f"{processes} x {' '.join(word.strip('-') for word in way)}"
            rows.append([name, *describe(talks)])
            measured[name] = [talk._asdict() for talk in talks]
    return measure.Report(
        title="Cost of communication",
        headings=("processes and sharding", "MB a step", "step, ms", "moving, ms", "waiting, ms", "moving"),
        rows=rows,
        measured=measured,
        notes=[
            "Medians over the steps: 3.3 million parameters, 4,096 tokens a step. `moving` is the time "
            "from the last process's entry into a collective until all have the result; `waiting` is the "
            "idle time of the others before that, on average. Processes that share two cores also wait for "
            "each other's turn."
        ],
    )


def describe(talks: Sequence[Talk]) -> list[str]:
    """Cells of the table: medians over the steps."""
    middle = Talk(*(statistics.median(values) for values in zip(*talks, strict=True)))
    times = [f"{1e3 * seconds:,.0f}" for seconds in (middle.seconds, middle.moving, middle.waiting)]
    return [f"{middle.bytes / 1e6:.1f}", *times, f"{middle.moving / middle.seconds:.0%}"]


# ---------------------------------------------------------------- all parts


MEASURES = dict(zip(PARTS, (measure_equality, measure_kills, measure_frozen, measure_talk), strict=True))


def run_campaign(options: argparse.Namespace) -> int:
    """Run the parts in turn; print, and write, each table when its part is done. The exit status."""
    statuses = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.steps)

        def report(part: str) -> measure.Report:
            report = MEASURES[part](folder, options)
            if options.figures is not None:
                report.save(options.figures, part)
            return report

        for part in options.parts:
            statuses.append(measure.run_plainly(lambda: report(part), as_json=options.json))  # noqa: B023 - called at once
            sys.stdout.flush()
    return max(statuses)


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--frozen", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="of each run that is compared")
    parser.add_argument("--heard-steps", type=int, default=15, help="of each run whose talk is timed")
    parser.add_argument("--seed", type=int, default=1, help="of the ranks and moments")
    parser.add_argument("--figures", type=Path, help="folder for each part's table")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run_campaign(read_options(sys.argv[1:])))
