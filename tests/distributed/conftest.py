"""Starts teams of processes that meet through gloo, and trains a small run in them.

The processes are forked from one that has imported everything and computed nothing, and get the environment
that torchrun sets. As under torchrun, the store is opened before they start, so that its port is free. Each
calls a function of roles.py by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from overnight.config import to_toml
from overnight.run_directory import RunDirectory
from overnight.training.checkpoint.format import TensorFiles
from overnight.training.checkpoint.load import read_model

PROCESSES = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = [
    *("overnight.cli", "overnight.run.train", "torch._dynamo", "tyro", "rich.progress"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.device_mesh"),
]
START = "import sys; sys.path.insert(0, folder); import roles; roles.play(*given)"
CLOCK = {"milliseconds", "tokens_per_second", "mfu"}  # all that a repetition may change
SECONDS = 250  # a busy machine may take long


@dataclasses.dataclass
class Member:
    """One process of a team."""

    process: BaseProcess
    answer: Connection
    log: Path  # standard output and standard error

    def outcome(self, seconds: float = SECONDS) -> tuple[str, Any]:
        """("returned", value), (name of an exception, its message), or ("ended", exit status)."""
        if not self.answer.poll(seconds):
            self.process.kill()
            pytest.fail(f"a process does not end; its log: {self.log.read_text()[-4000:]}")
        sent = None
        with contextlib.suppress(EOFError):
            sent = self.answer.recv()
        self.process.join()
        return sent or ("ended", self.process.exitcode)


@dataclasses.dataclass
class Teams:
    """Starts teams of processes."""

    folder: Path
    numbers: itertools.count[int] = dataclasses.field(default_factory=itertools.count)

    def start(
        self,
        role: str,
        *given: object,
        size: int,
        machines: int = 1,
        each: Sequence[Sequence[object]] = (),
        environment: dict[str, str] | None = None,
        launcher: Callable[[int, int, int, int], dict[str, str]] | None = None,
    ) -> list[Member]:
        """Start `size` processes with this role; `each` holds further arguments by rank.

        `launcher` makes their environment from rank, size, size on a machine and the store's port.
        """
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        PROCESSES.set_forkserver_preload(SLOW_IMPORTS)
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        team = []
        for rank in range(size):
            variables = (launcher or torchrun)(rank, size, size // machines, store.port) | (environment or {})
            answer, sent = PROCESSES.Pipe(duplex=False)
            log = folder / f"rank-{rank}.log"
            own = [*given, *(each[rank] if each else ())]
            names = {"folder": str(Path(__file__).parent), "given": (role, own, variables, str(log), sent)}
            process = PROCESSES.Process(target=exec, args=(START, names))
            process.start()
            sent.close()
            team.append(Member(process, answer, log))
        team[0].store = store  # type: ignore[attr-defined]  # held for as long as the team is
        return team

    def outcomes(self, role: str, *given: object, **how: Any) -> list[tuple[str, Any]]:
        """How the role ended, by rank."""
        return [member.outcome() for member in self.start(role, *given, **how)]

    def __call__(self, role: str, *given: object, **how: Any) -> list[Any]:
        """What the role returned, by rank."""
        found = self.outcomes(role, *given, **how)
        assert [how for how, _ in found] == ["returned"] * len(found), found
        return [value for _, value in found]


def torchrun(rank: int, size: int, local_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a process."""
    variables = {
        **{"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local_size},
        **{"LOCAL_WORLD_SIZE": local_size, "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        **{"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0},
    }
    return {name: str(value) for name, value in variables.items()}


@pytest.fixture
def team(tmp_path_factory):
    """Starts several processes."""
    return Teams(tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """One folder for all of pytest's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def text(shared_folder, prepare_texts):
    """Shards of some 40 documents in characters, about 5,000 training tokens."""
    with FileLock(shared_folder / "text.lock"):
        shards = shared_folder / "text/shards"
        return shards if shards.is_dir() else prepare_texts(shared_folder / "text")


@pytest.fixture(scope="session")
def recipe(text, small_recipe):
    """`recipe(**settings)`: 20 steps of 8 micro-batches, with dropout, over two epochs."""
    every = {"evaluate_every_steps": 10, "sample_every_steps": 10, "checkpoint_every_steps": 5}
    usual = {"peak_learning_rate": 1e-3, "tokens_per_step": 16 * 32, "micro_batch_size": 2}
    usual |= {"total_steps": 20, "sample_prompts": ("", "Line", "L"), **every}
    return lambda **settings: small_recipe(text, **usual | settings)


@pytest.fixture
def folder(recipe, tmp_path):
    """A folder with small.toml in it."""
    (tmp_path / "small.toml").write_text(to_toml(recipe()))
    return tmp_path


def read_contents(checkpoint: Path) -> dict[str, Any]:
    """A digest of every weight and moment of a checkpoint, and its state.json without files and settings."""
    tensors = dict(read_model(checkpoint).weights())
    moments = TensorFiles(sorted(checkpoint.glob("optimizer*.safetensors")))
    for name, shape in moments.shapes.items():
        moments.read(name, tensors.setdefault(name, torch.full(shape, float("nan"))))
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    state = json.loads((checkpoint / "state.json").read_text())
    return {
        **{name: (*tensors[name].shape, digest.hexdigest()) for name, digest in digests.items()},
        **{name: value for name, value in state.items() if name not in {"files", "settings"}},
    }


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run, finished or not."""

    path: Path
    read: Sequence[Sequence[tuple[Any, ...]]] = ()  # by rank, of each batch: step, first row, rows, digest

    @property
    def directory(self) -> RunDirectory:
        """What it wrote."""
        return RunDirectory(self.path)

    @property
    def newest(self) -> Path:
        """Its last checkpoint."""
        return max(self.directory.checkpoints.glob("step-*"))

    def losses(self) -> list[float]:
        """Of every step, each of which has one line."""
        lines = self.directory.read_metrics()
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def record(self) -> dict[str, Any]:
        """Everything that it wrote, to the bit, without times and speeds."""
        lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in self.directory.read_metrics()]
        events = {kind: self.directory.read_events(kind) for kind in ("evaluations", "samples")}
        return {"losses": self.losses(), "metrics": lines, **read_contents(self.newest), **events}

    def ledger(self) -> list[tuple[Any, ...]]:
        """Every batch that was trained on, ordered by step and rank."""
        return sorted(itertools.chain(*self.read), key=lambda batch: batch[0])


@pytest.fixture(scope="session")
def contents():
    """Of a checkpoint: the same for checkpoints that are equal to the bit."""
    return read_contents


@pytest.fixture(scope="session")
def record():
    """Of the run in a folder: the same for runs that are equal to the bit."""
    return lambda path: Trained(path).record()


@pytest.fixture(scope="session")
def trained(shared_folder, tmp_path_factory, recipe):
    """A run of `size` processes with these settings, trained once for all tests."""
    teams = Teams(tmp_path_factory.mktemp("trained"))

    def train(size: int, *, machines: int = 1, at_once: int | None = 3, **settings: Any) -> Trained:
        values = "-".join(map(str, [size, machines, at_once, *itertools.chain(*sorted(settings.items()))]))
        name = hashlib.sha256(values.encode()).hexdigest()[:16]
        path, notes = shared_folder / name, shared_folder / f"{name}.pickle"
        with FileLock(shared_folder / f"{name}.lock"):
            if not notes.is_file():
                given = (recipe(**settings), path, None, at_once)
                read = teams("train", *given, size=size, machines=machines)
                notes.write_bytes(pickle.dumps(read))
        return Trained(path, pickle.loads(notes.read_bytes()))

    return train
