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

from overnight.jobs import LaunchConfig
from overnight.preparation.prepare_commands import JobText

RESTARTS = 3  # if the recipe does not say
SAVE_SECONDS = 150  # from SIGTERM to SIGKILL, for a process that has not saved
LONGEST_NAME = 45  # Kubernetes allows 63 for a pod's name, which ends in -worker-N


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One run on a cluster. A setting that is None becomes YOUR-SOMETHING in the file where it is needed."""

    config: LaunchConfig
    path: str
    """Path of the job file."""
    made_by: str
    """The command that writes the file."""
    words: tuple[str, ...]
    """The recipe and its options: the arguments of `overnight train`."""
    texts: tuple[JobText, ...]
    """Must be prepared before the run starts."""
    programs: str | None = None
    """The folder of this machine's `overnight` and `torchrun`, for nodes that share its disk."""

    @property
    def local_texts(self) -> tuple[JobText, ...]:
        """The texts that are folders, not URLs."""
        return tuple(text for text in self.texts if not text.is_remote)

    @property
    def max_restarts(self) -> int:
        """Number of restarts of all processes by torchrun after one has failed."""
        return self.config.compute.max_restarts or RESTARTS

    @property
    def processes_per_node(self) -> int:
        """One for each GPU."""
        return max(1, self.config.gpus_per_node)

    @property
    def run(self) -> str:
        """The run directory."""
        return f"runs/{self.config.run_name}"

    @property
    def name(self) -> str:
        """The run's name in lower-case letters, digits and hyphens, a letter first, as all targets allow."""
        plain = re.sub("[^a-z0-9]+", "-", self.config.run_name.lower())
        plain = plain if plain[:1].isalpha() else f"run-{plain}"
        return plain[:LONGEST_NAME].strip("-")

    @property
    def size(self) -> str:
        """Number of nodes and GPUs, in words."""
        count, gpus = self.config.nodes, self.config.gpus_per_node
        nodes = "1 node" if count == 1 else f"{count} nodes"
        if not gpus:
            return f"{nodes}, without GPUs"
        return f"{nodes} with {gpus} GPU{'s' if gpus > 1 else ''}{' each' if count > 1 else ''}"


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
