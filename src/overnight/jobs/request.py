"""What a job file is written from, and the lines of shell that all of them share.

A file is written by hand as text, since its comments matter. All begin the run, or go on with it where
`runs/NAME/recipe.toml` is there, and each process decides that for itself as it starts: so a job that is
queued again, a machine that comes back and a restart of torchrun's take up the run where it was saved.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from dataclasses import dataclass

from overnight.preparation.prepare_commands import JobText

SAVE_SECONDS = 150  # between SIGTERM and the end of a process that has not saved by then
LONGEST_NAME = 45  # Kubernetes has 63 for a pod's, which ends in -worker-N


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One run on `nodes` machines. What is None stands in the file as YOUR-SOMETHING where it is needed."""

    path: str
    """Where the file is to lie."""
    made_by: str
    """The command that asked for it."""
    run_name: str
    words: tuple[str, ...]
    """The recipe and the options, as they follow `overnight train`."""
    texts: tuple[JobText, ...] = ()
    """What must be prepared before the run begins."""
    nodes: int = 1
    gpus_per_node: int = 8
    """0 for machines without: they have one process each."""
    max_restarts: int = 3
    """How often torchrun begins again after a process has died."""
    hours: float = 24.0
    """The job's time limit, where there is one."""
    gpu: str | None = None
    """Its kind, as SkyPilot writes it: H100, A100-80GB."""
    partition: str | None = None
    image: str | None = None
    bucket: str | None = None
    role: str | None = None
    shared_disk: str | None = None
    programs: str | None = None
    """The folder of this machine's `overnight` and `torchrun`, for nodes that see its disk."""

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
        """The run's name as all four allow it: small letters, digits and hyphens, a letter first."""
        plain = re.sub("[^a-z0-9]+", "-", self.run_name.lower())
        plain = plain if plain[:1].isalpha() else f"run-{plain}"
        return plain[:LONGEST_NAME].strip("-")

    @property
    def size(self) -> str:
        """How many machines and processes, in words."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        if not self.gpus_per_node:
            return f"{nodes}, without GPUs"
        each = " each" if self.nodes > 1 else ""
        return f"{nodes} with {self.gpus_per_node} GPU{'s' if self.gpus_per_node > 1 else ''}{each}"


def quote(word: str) -> str:
    """`word` for a shell, on one line whatever is in it."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escape, word))}'"


def _escape(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return f"\\x{ord(letter):02x}" if letter.isascii() else f"\\U{ord(letter):08x}"


def join(words: tuple[str, ...]) -> str:
    """A command line."""
    return " ".join(map(quote, words))


def yaml_text(word: str) -> str:
    """`word` as a text in YAML, on one line whatever is in it."""
    quoted = json.dumps(word, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def block(script: str, spaces: int) -> str:
    """A script as the lines of a literal block of YAML, so far to the right."""
    return textwrap.indent(script.strip("\n"), " " * spaces)


def define_train(request: JobRequest) -> str:
    """The shell function `train`, which every process runs."""
    run = quote(request.run)
    return f"""\
# Every process begins the run, or goes on with it where it was begun: after a restart, too.
train() {{
  if [ -f {quote(f"{request.run}/recipe.toml")} ]; then
    exec overnight train --resume {run}
  else
    exec overnight train {join(request.words)}
  fi
}}
export -f train
"""


def define_is_finished(run: str) -> str:
    """The shell function `is_finished`: whether all steps of the run directory `run` are done and saved."""
    return f"""\
is_finished() {{ overnight runs {run} --json | grep -q '"state": "finished"'; }}
"""


# What follows torchrun in the background. A signal ends a wait, and not what is waited for.
WAIT_FOR_IT = """\
running=$!
trap 'kill "$running"' TERM # torchrun tells its processes, which save
while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done
wait "$running" && status=0 || status=$?
# Processes that are told to stop, on any node, save and end well; then the run is not done.
[ "$status" -ne 0 ] || is_finished || status=1
"""


def prepare_texts(request: JobRequest, is_first: str) -> str:
    """Prepare the text on one node, where the shell's condition `is_first` holds, while the others wait."""
    lines = []
    for text in request.texts:
        if text.is_remote:
            continue
        manifest = quote(f"{text.folder}/manifest.json")
        if text.prepare:
            lines += [
                "# The text is prepared once, by the first node; the others wait for it.",
                f"if {is_first} && [ ! -f {manifest} ]; then",
                f"  {join(text.prepare)}",
                "fi",
                f"until [ -f {manifest} ]; do sleep 10; done",
            ]
        else:
            lines.append(refuse_without(text))
    return "\n".join([*lines, ""]) if lines else ""


def refuse_without(text: JobText) -> str:
    """Lines that end the job where the text is not there."""
    how = f": {join(text.prepare)}" if text.prepare else ""
    return f"""\
if [ ! -f {quote(f"{text.folder}/manifest.json")} ]; then
  echo {quote(f"{text.folder} is not prepared{how}")} >&2
  exit 2
fi"""
