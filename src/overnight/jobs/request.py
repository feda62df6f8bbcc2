"""The values that a job file is written from, and how they are quoted for a shell and for YAML.

Every job file starts the run, or resumes it if `runs/NAME/recipe.toml` exists. Each process decides this when
it starts, so a requeued job, a replaced machine and a restart by torchrun all resume where the run was saved.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from overnight.preparation.prepare_commands import JobText

SAVE_SECONDS = 150  # between SIGTERM and SIGKILL for a process that has not saved by then
LONGEST_NAME = 45  # Kubernetes allows 63 for a pod's name, which ends in -worker-N


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One run on `nodes` machines. What is None becomes YOUR-SOMETHING in the file where it is needed."""

    path: str
    """Of the job file."""
    made_by: str
    """The command that writes the file."""
    run_name: str
    words: tuple[str, ...]
    """The recipe and its options: the arguments of `overnight train`."""
    texts: tuple[JobText, ...] = ()
    """Must be prepared before the run starts."""
    nodes: int = 1
    gpus_per_node: int = 8
    """0 for machines without GPUs, which run one process each."""
    max_restarts: int = 3
    """How often torchrun restarts all processes after one has failed."""
    hours: float = 24.0
    """The job's time limit, where there is one."""
    gpu: str | None = None
    """Its kind, as SkyPilot spells it: H100, A100-80GB."""
    partition: str | None = None
    image: str | None = None
    bucket: str | None = None
    role: str | None = None
    shared_disk: str | None = None
    programs: str | None = None
    """The folder of this machine's `overnight` and `torchrun`, for nodes that share its disk."""

    @property
    def local_texts(self) -> tuple[JobText, ...]:
        """The texts that are folders, not URLs."""
        return tuple(text for text in self.texts if not text.is_remote)

    @property
    def processes_per_node(self) -> int:
        """One for each GPU."""
        return max(1, self.gpus_per_node)

    @property
    def run(self) -> str:
        """The run directory."""
        return f"runs/{self.run_name}"

    @property
    def name(self) -> str:
        """The run's name in lower-case letters, digits and hyphens, a letter first: all targets allow it."""
        plain = re.sub("[^a-z0-9]+", "-", self.run_name.lower())
        plain = plain if plain[:1].isalpha() else f"run-{plain}"
        return plain[:LONGEST_NAME].strip("-")

    @property
    def size(self) -> str:
        """Number of nodes and GPUs, in words."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        if not self.gpus_per_node:
            return f"{nodes}, without GPUs"
        each = " each" if self.nodes > 1 else ""
        return f"{nodes} with {self.gpus_per_node} GPU{'s' if self.gpus_per_node > 1 else ''}{each}"


def quote(word: str) -> str:
    """`word` quoted for bash, always on one line."""
    return shlex.quote(word) if word.isprintable() else f"$'{''.join(map(_escape, word))}'"


def _escape(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return f"\\x{ord(letter):02x}" if letter.isascii() else f"\\U{ord(letter):08x}"


def join_words(words: Iterable[str]) -> str:
    """The words as a command line."""
    return " ".join(map(quote, words))


def yaml_string(word: str) -> str:
    """`word` as a double-quoted YAML string, always on one line."""
    quoted = json.dumps(word, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)
