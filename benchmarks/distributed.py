"""What becomes of a run in several processes: whether it is the same, what it survives, what talking costs.

    python benchmarks/distributed.py --write docs/distributed.md
    python benchmarks/distributed.py --parts kills frozen --kills 2 --frozen 1

Everything is asked of the command itself, on a CPU, with a small model on Python's documentation. The
parts are equality, kills, frozen and communication. With --write each table takes its place in a document,
between `<!-- figures: PART -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import Report, run_plainly, spread
from overheard import Talk, read_notes

HERE = Path(__file__).parent
PARTS = ("equality", "kills", "frozen", "communication")
CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # the only values that a repetition may change
TIMEOUT_SECONDS = 5
SECONDS_AT_MOST = 600  # of a command
FROZEN = 70  # the exit status of a process that made no progress

RECIPE = """
[data]
data = "{shards}"
tokenizer = "characters"

[model]
n_layer = 2
n_head = 2
n_embd = 32
context_length = 64
dropout = 0.1

[optimizer]
peak_learning_rate = 1e-3

[schedule]
total_steps = {steps}
warmup_steps = 10

[batch]
tokens_per_step = 1024
rows_per_micro_batch = 2

[compute]
device = "cpu"
precision = "fp32"
compile = false

[evaluation]
evaluate_every_steps = 50
evaluation_tokens = 20000

[samples]
sample_every_steps = 50
sample_tokens = 16

[checkpoints]
checkpoint_every_steps = 20
"""

LARGER = ("--n-layer", "4", "--n-embd", "256", "--n-head", "4", "--context-length", "256")
LARGER_STEP = ("--tokens-per-step", "4096", "--evaluate-every-steps", "1000", "--sample-every-steps", "1000")

# Found by every Python of a run: told by a signal, a process sleeps for ever where it stands.
FREEZE = """
import os, signal, time

def freeze(number, frame):
    while True:
        time.sleep(1)

if "RANK" in os.environ:
    signal.signal(signal.SIGUSR1, freeze)
"""


class Place(NamedTuple):
    """A folder in which the commands are given: recipe.toml lies there, and a folder `site`."""

    folder: Path

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / "runs" / name


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    said: str
    seconds: float


def prepare(folder: Path, steps: int) -> Place:
    """Shards of Python's documentation, by characters, and a recipe of so many steps on them."""
    shards = folder / "shards"
    words = (
        "prepare",
        "python-docs",
        "--tokenizer",
        "characters",
        "--tokens",
        "500000",
        "--out",
        str(shards),
    )
    subprocess.run([*overnight(), *words], check=True, capture_output=True)
    (folder / "recipe.toml").write_text(RECIPE.format(shards=shards, steps=steps))
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(FREEZE)
    return Place(folder)


def overnight() -> list[str]:
    """The command."""
    return [sys.executable, "-P", "-m", "overnight"]


@contextlib.contextmanager
def started(place: Place, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in that place, one thread to a process; whatever is left of it in the end is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place.folder / "site")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=place.folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        process.said = said  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(process: subprocess.Popen[str], since: float | None = None) -> Ended:
    """The command's end, and how long it took since then. Raises ValueError if it does not end."""
    since = time.monotonic() if since is None else since
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_AT_MOST)
    status, seconds = process.poll(), time.monotonic() - since
    process.said.seek(0)  # type: ignore[attr-defined]
    said = process.said.read()  # type: ignore[attr-defined]
    if status is None:
        raise ValueError(f"a command does not end: {shlex.join(map(str, process.args))}: {said}")  # type: ignore[arg-type]
    return Ended(status, said, seconds)


def train(place: Place, name: str, *words: str) -> Path:
    """A run from its beginning to its end, undisturbed. Raises ValueError if it fails."""
    with started(place, [*overnight(), "train", "recipe.toml", "--run-name", name, *words]) as process:
        ended = wait_for(process)
    if ended.status != 0:
        raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return place.run(name)


def newest(run: Path) -> Path:
    """Its last checkpoint."""
    return max((run / "checkpoints").glob("step-*"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON, without the clock's values; [] if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def digest(run: Path) -> str:
    """Of everything that a run has written but for the clock: weights, moments, metrics and events."""
    total = hashlib.sha256()
    for path in sorted(newest(run).iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    for name in ("metrics.jsonl", "events/evaluations.jsonl", "events/samples.jsonl"):
        total.update(json.dumps(read_lines(run / name)).encode())
    return total.hexdigest()


# ---------------------------------------------------------------- equality


class Team(NamedTuple):
    """So many processes and what they divide."""

    processes: int
    sharding: str
    machines: int = 1

    def name(self) -> str:
        """In words."""
        machines = f", {self.machines} machines" if self.machines > 1 else ""
        return f"{self.processes} x {self.sharding}{machines}"


TEAMS = [
    *(Team(size, sharding) for size in (1, 2, 4) for sharding in ("none", "optimizer", "full")),
    Team(4, "hybrid", 2),
]


def train_in_team(place: Place, team: Team, *words: str) -> Path:
    """By the command itself; several machines are as many torchruns that meet on this one."""
    name = "-".join([*map(str, team), *(word.strip("-") for word in words)])
    options = ("--sharding", team.sharding, *words)
    if team.machines == 1:
        return train(place, name, "--processes", str(team.processes), *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(team.machines)]
    torchrun += ["--nproc-per-node", str(team.processes // team.machines), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"localhost:{random.randrange(20_000, 30_000)}", "-m", "overnight"]
    command = [*torchrun, "train", "recipe.toml", "--run-name", name, *options]
    with contextlib.ExitStack() as agents:
        processes = [agents.enter_context(started(place, command)) for _ in range(team.machines)]
        for ended in map(wait_for, processes):
            if ended.status != 0:
                raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return place.run(name)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two losses of the same step, relative to them."""
    return max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True))


def compare_weights(ours: Path, theirs: Path) -> float:
    """The largest difference between two models' weights; 0.0 says that they are equal to the bit."""
    from overnight.checkpoint import read_model

    mine, other = (read_model(newest(run)).weights() for run in (ours, theirs))
    return max(float((mine[name] - other[name]).abs().max()) for name in other)


def measure_equality(place: Place, options: argparse.Namespace) -> Report:
    """Each team's run beside that of one process; in bitwise mode every bit must be the same."""
    alone, alone_bitwise = train(place, "alone"), train(place, "alone-bitwise", "--bitwise")
    losses = [line["loss"] for line in read_lines(alone / "metrics.jsonl")]
    rows, measured = [], {}
    for team in TEAMS:
        run = train_in_team(place, team)
        found = [line["loss"] for line in read_lines(run / "metrics.jsonl")]
        early, late = (largest_difference(found[:step], losses[:step]) for step in (20, len(losses)))
        bits = "cannot"
        if team.sharding in {"none", "optimizer"}:
            bitwise = train_in_team(place, team, "--bitwise")
            bits = "equal" if compare_weights(bitwise, alone_bitwise) == 0 else "DIFFERENT"
        weights = compare_weights(run, alone)
        shown = [f"{difference:.1e}" if difference else "0" for difference in (early, late, weights)]
        rows.append([team.name(), *shown, bits])
        measured[team.name()] = [early, late, weights, bits]
    return Report(
        title="The same run",
        headings=(
            *("processes and sharding", "loss, 20 steps", f"loss, {options.steps} steps"),
            *("weights", f"weights after {options.steps} steps, bitwise"),
        ),
        rows=rows,
        measured=measured,
        notes=[
            "Beside one process by itself: the largest relative difference of a step's loss, and the largest "
            "difference of a weight in the end."
        ],
    )


# ---------------------------------------------------------------- processes that die and freeze


def ranks_of(parent: int) -> dict[int, int]:
    """The processes that an agent has started: their ids, by rank. Empty until they run."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if status.read_text().rpartition(")")[2].split()[1] == str(parent):
                environment = (status.parent / "environ").read_bytes()
                for rank in re.findall(rb"(?:^|\0)RANK=([0-9]+)", environment):
                    found[int(rank)] = int(status.parent.name)
    return found


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Raises ValueError if the command ends before."""
    while not condition():
        if process.poll() is not None:
            raise ValueError(f"the run ended too early: {wait_for(process).said}")
        time.sleep(0.002)


def count_lines(run: Path) -> int:
    """Steps that have been done."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def send(process: subprocess.Popen[str], rank: int, number: int) -> float:
    """A signal to one process of the run, once all of them are there; when that was."""
    wait_until(process, lambda: len(ranks_of(process.pid)) == 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks_of(process.pid)[rank], number)
    return time.monotonic()


class Kill(NamedTuple):
    """A run one of whose processes was killed."""

    seconds: float
    """From then to the end of the command."""
    by_itself: bool
    """Whether the run came to its end without being resumed."""


def kill(place: Place, name: str, rank: int, moment: float, restarts: int) -> Kill | None:
    """Train, kill, and resume if need be; None if the run was done before that moment.

    Raises ValueError if the run can't be resumed.
    """
    command = [*overnight(), "train", "recipe.toml", "--run-name", name, "--processes", "2"]
    with started(place, [*command, "--max-restarts", str(restarts)]) as process:
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
    is_begun = (place.run(name) / "recipe.toml").is_file()
    again = [*overnight(), "train", "--resume", f"runs/{name}"] if is_begun else command
    with started(place, again) as process:
        resumed = wait_for(process)
    if resumed.status != 0:
        raise ValueError(f"{name} can't be resumed: {resumed.said}")
    return Kill(ended.seconds, by_itself=False)


def measure_kills(place: Place, options: argparse.Namespace) -> Report:
    """A random one of two processes dies at a random moment, again and again: the run must stay the same.

    Every other run may be begun anew by itself; the rest is resumed by the command that is proposed. Raises
    ValueError if one differs.
    """
    draw = random.Random(options.seed)
    began = time.monotonic()
    expected = digest(train(place, "peace", "--processes", "2"))
    seconds = time.monotonic() - began
    kills: list[Kill] = []
    for number in range(100 * options.kills):
        name, rank, moment = f"killed-{number}", draw.randrange(2), draw.uniform(0, seconds)
        killed = kill(place, name, rank, moment, restarts=len(kills) % 2)
        if digest(place.run(name)) != expected:
            raise ValueError(f"{name}, rank {rank} after {moment:.2f} s: the run is not the one in peace")
        kills += [killed] if killed else []
        if len(kills) == options.kills:
            break
    by_itself = sum(each.by_itself for each in kills)
    ends = [each.seconds for each in kills if not each.by_itself]
    return Report(
        title="Killed processes",
        headings=("what", "count"),
        rows=[
            ["kills (SIGKILL) of a random one of two processes at a random moment", str(len(kills))],
            ["runs that came to their end by themselves (--max-restarts 1)", str(by_itself)],
            ["runs that were resumed", str(len(kills) - by_itself)],
            ["equal to the run in peace, to the bit", f"{len(kills)}/{options.kills}"],
            ["seconds from the kill to the end of the command: median", spread(ends, 1)[0]],
            ["the longest of them", spread(ends, 1)[2]],
        ],
        measured={"kills": [each._asdict() for each in kills]},
        settings={"seed": options.seed, "sha256": expected[:16]},
    )


def measure_frozen(place: Place, options: argparse.Namespace) -> Report:
    """A random process stands still at a random step: the run must end, and tell where all stand.

    Raises ValueError if one does not.
    """
    draw = random.Random(options.seed)
    ends = []
    for number in range(options.frozen):
        name, rank, step = f"frozen-{number}", draw.randrange(2), draw.randrange(1, options.steps // 2)
        command = [*overnight(), "train", "recipe.toml", "--run-name", name, "--processes", "2"]
        with started(place, [*command, "--timeout-seconds", str(TIMEOUT_SECONDS)]) as process:
            wait_until(process, lambda: count_lines(place.run(name)) >= step)  # noqa: B023 - called at once
            frozen_at = send(process, rank, signal.SIGUSR1)
            ended = wait_for(process, frozen_at)
        told = all(f"rank {each} made no progress" in ended.said for each in range(2))
        if ended.status != FROZEN or not told or "in freeze" not in ended.said:
            raise ValueError(f"rank {rank}, frozen at step {step}, was not told of: {ended.said}")
        ends.append(ended.seconds)
    total = options.frozen
    return Report(
        title="Frozen processes",
        headings=("what", "count"),
        rows=[
            ["a random one of two processes stands still at a random step", str(total)],
            ["runs that ended, with the stacks of both", f"{total}/{total}"],
            [f"seconds until then, with --timeout-seconds {TIMEOUT_SECONDS}: median", spread(ends, 1)[0]],
            ["the longest of them", spread(ends, 1)[2]],
        ],
        measured={"seconds": ends},
        settings={"seed": options.seed},
    )


# ---------------------------------------------------------------- what talking costs


WAYS = (("none",), ("none", "--bitwise"), ("optimizer",), ("full",))


def listen_to(place: Place, processes: int, way: Sequence[str], steps: int) -> list[Talk]:
    """What each step of a larger model spends on the others. Raises ValueError if the run fails."""
    name = f"heard-{processes}-{'-'.join(way)}"
    notes = place.folder / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), str(HERE / "overheard.py"), str(notes), "train", "recipe.toml"]
    command += ["--run-name", name, "--sharding", *way, *LARGER, *LARGER_STEP]
    with started(place, [*command, "--total-steps", str(steps), "--warmup-steps", "1"]) as process:
        ended = wait_for(process)
    if ended.status != 0:
        raise ValueError(f"{name} ended with status {ended.status}: {ended.said}")
    return read_notes(notes, processes)


def measure_communication(place: Place, options: argparse.Namespace) -> Report:
    """By the number of processes, and what they divide."""
    rows, measured = [], {}
    for processes in (2, 4):
        for way in WAYS:
            talks = listen_to(place, processes, way, options.heard_steps)
            name = f"{processes} x {' '.join(word.strip('-') for word in way)}"
            rows.append([name, *describe(talks)])
            measured[name] = [talk._asdict() for talk in talks]
    return Report(
        title="What talking costs",
        headings=("processes and sharding", "MB a step", "step, ms", "moving, ms", "waiting, ms", "moving"),
        rows=rows,
        measured=measured,
        notes=[
            "Medians over the steps: 3.3 million parameters, 4,096 tokens a step. `moving` is from when the "
            "last process has come to a call until all have what they want, `waiting` what the others "
            "stand idle before that, on average; processes that share two cores wait for each other's turn."
        ],
    )


def describe(talks: Sequence[Talk]) -> list[str]:
    """Cells of the table: medians over the steps."""
    middle = Talk(*(statistics.median(values) for values in zip(*talks, strict=True)))
    times = [f"{1e3 * seconds:,.0f}" for seconds in (middle.seconds, middle.moving, middle.waiting)]
    return [f"{middle.bytes / 1e6:.1f}", *times, f"{middle.moving / middle.seconds:.0%}"]


# ---------------------------------------------------------------- the document


MEASURES = dict(
    zip(PARTS, (measure_equality, measure_kills, measure_frozen, measure_communication), strict=True)
)


def put(document: str, part: str, figures: str) -> str:
    """The document with these figures in their place. Raises ValueError if it has none for them."""
    begin, end = f"<!-- figures: {part} -->", "<!-- end of figures -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found, count = pattern.subn(lambda _: f"{begin}\n\n{figures}\n\n{end}", document)
    if count != 1:
        raise ValueError(f"the document has no place for {part}: write {begin} and {end} where it is to be")
    return found


def find_commit() -> str:
    """Of the checkout, with a word if it has been changed since."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (commit.stdout.strip() or "unknown") + (" and changes" if changed.stdout else "")


def write(path: Path, part: str, report: Report, words: Sequence[str]) -> None:
    """Put a report into the document, with the commit, the date and the command, and without its title."""
    _, *paragraphs = report.as_markdown().split("\n\n")
    command = shlex.join(["python", "benchmarks/distributed.py", *words])
    source = f"Commit {find_commit()}; `{command}`."
    path.write_text(put(path.read_text(encoding="utf-8"), part, "\n\n".join([*paragraphs, source])))


def run_campaign(options: argparse.Namespace, words: Sequence[str]) -> int:
    """One part after the other; each is shown, and written, when it is done. The exit status."""
    if options.write is not None:
        for part in options.parts:
            put(options.write.read_text(encoding="utf-8"), part, "")
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder), options.steps)

        def measure(part: str) -> Report:
            report = MEASURES[part](place, options)
            if options.write is not None:
                write(options.write, part, report, words)
            return report

        for part in options.parts:
            statuses.append(run_plainly(lambda: measure(part), as_json=options.json))  # noqa: B023 - called at once
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
    parser.add_argument("--write", type=Path, help="a document with a place for each table")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run_campaign(read_options(sys.argv[1:]), sys.argv[1:]))
