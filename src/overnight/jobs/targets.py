"""A run on a cluster, and the job file that starts it: the template of a target, filled with its values.

Every job file starts the run, or resumes it if `runs/NAME/recipe.toml` exists. Each process decides this when
it starts, so a requeued job, a replaced machine and a restart by torchrun all resume where the run was saved.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from overnight.config import nearest
from overnight.jobs import LaunchConfig
from overnight.preparation.prepare_commands import JobText
from overnight.report.html import text_templates
from overnight.terminal import join_words, quote

RESTARTS = 3  # if the recipe does not say
SAVE_SECONDS = 150  # from SIGTERM to SIGKILL, for a process that has not saved
LONGEST_NAME = 45  # Kubernetes allows 63 for a pod's name, which ends in -worker-N

# SageMaker's limits: characters of an argument and of a variable, number of arguments, hours of a job.
LONGEST_ARGUMENT, LONGEST_VARIABLE, MOST_ARGUMENTS, LONGEST_HOURS = 256, 512, 100, 28 * 24
SAGEMAKER_SAVE_SECONDS = 100  # SageMaker kills 120 seconds after SIGTERM

# GPU and number of GPUs -> instance, by AWS's tables of accelerated instances.
INSTANCES = {
    "A10G": {1: "ml.g5.8xlarge", 4: "ml.g5.12xlarge", 8: "ml.g5.48xlarge"},
    "A100": {8: "ml.p4d.24xlarge"},
    "A100-80GB": {8: "ml.p4de.24xlarge"},
    "B200": {8: "ml.p6-b200.48xlarge"},
    "H100": {1: "ml.p5.4xlarge", 8: "ml.p5.48xlarge"},
    "H200": {8: "ml.p5en.48xlarge"},
    "L4": {1: "ml.g6.8xlarge", 4: "ml.g6.12xlarge", 8: "ml.g6.48xlarge"},
    "L40S": {1: "ml.g6e.8xlarge", 4: "ml.g6e.12xlarge", 8: "ml.g6e.48xlarge"},
    "V100": {1: "ml.p3.2xlarge", 4: "ml.p3.8xlarge", 8: "ml.p3.16xlarge"},
}
CPU_INSTANCE = "ml.c7i.8xlarge"

TEMPLATES = {
    "slurm": "slurm.sh",
    "skypilot": "sky.yaml",
    "sagemaker": "sagemaker.yaml",
    "kubernetes": "kubernetes.yaml",
}
SUBMIT_COMMANDS = {
    "slurm": ("sbatch",),
    "skypilot": ("sky", "jobs", "launch"),
    "kubernetes": ("kubectl", "apply", "-f"),
}


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


def job_file(target: str, request: JobRequest) -> str:
    """The content of the job file for `target`. Raises ValueError for what the target cannot run."""
    values: dict[str, Any] = {"job": request, "save_seconds": SAVE_SECONDS}
    if target == "slurm":
        minutes = round(request.config.hours * 60)
        values["time_limit"] = f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
        values["warning_seconds"] = SAVE_SECONDS + 30
    elif target == "sagemaker":
        values |= sagemaker_values(request)
    return _environment().get_template(TEMPLATES[target]).render(values)


def submit_command(target: str, request: JobRequest) -> str:
    """The shell command that submits the file; for SageMaker it uploads the text first."""
    if target != "sagemaker":
        return join_words((*SUBMIT_COMMANDS[target], request.path))
    commands = [
        join_words(("aws", "s3", "sync", text.folder, _s3_address(request, text.folder)))
        for text in request.local_texts
    ]
    create = ("aws", "sagemaker", "create-training-job", "--cli-input-yaml", f"file://{request.path}")
    # Each job needs a new name, so the command adds the time.
    name = f'--training-job-name "{request.name}-$(date +%Y%m%d-%H%M%S)"'
    return " && ".join([*commands, f"{join_words(create)} {name}"])


def find_instance(gpu: str, gpus: int) -> str:
    """The SageMaker instance with `gpus` GPUs of that kind. Raises ValueError with the known ones."""
    if gpus == 0:
        return CPU_INSTANCE
    kinds = INSTANCES.get(gpu.upper())
    if kinds is None:
        raise ValueError(f"gpu={gpu}: no known SageMaker instance has this GPU{nearest(gpu, INSTANCES)}")
    if gpus not in kinds:
        counts = " or ".join(map(str, kinds))
        raise ValueError(f"gpus_per_node={gpus}: SageMaker has instances with {counts} {gpu.upper()}")
    return kinds[gpus]


def sagemaker_values(request: JobRequest) -> dict[str, Any]:
    """Instance, channels and time. Raises ValueError if SageMaker has no instance or no room for the job."""
    if request.config.hours > LONGEST_HOURS:
        raise ValueError(f"hours={request.config.hours:g}: a SageMaker job runs for at most {LONGEST_HOURS}")
    if len(request.words) > MOST_ARGUMENTS:
        raise ValueError(
            f"SageMaker takes {MOST_ARGUMENTS} arguments, and the run has {len(request.words)}: "
            "put its options into a recipe file in the image"
        )
    for word in request.words:
        if len(word) > LONGEST_ARGUMENT or "\n" in word:
            raise ValueError(
                f"{word[:40]!r} is not possible in a SageMaker job, where an option has at most "
                f"{LONGEST_ARGUMENT} characters and no line break: put it into a recipe file in the image"
            )
    return {
        "bucket": _s3_address(request, ""),
        "channels": _channels(request),
        "data_option": _data_option(request),
        "instance": find_instance(request.config.gpu or "H100", request.config.gpus_per_node),
        "seconds": round(request.config.hours * 3600),
        "save_seconds": SAGEMAKER_SAVE_SECONDS,
    }


def _environment() -> jinja2.Environment:
    environment = text_templates("overnight.jobs")
    environment.filters |= {
        "quote": quote,
        "join_words": join_words,
        "yaml": yaml_string,
        "double_dollars": _double_dollars,
        "variable": _check_variable,
    }
    return environment


def _double_dollars(script: str) -> str:
    """Double each $ before ( or $: Kubernetes expands $(NAME) and $$ in a container's arguments."""
    return re.sub(r"\$(?=[$(])", "$$", script)


def _check_variable(script: str) -> str:
    """A script for an environment variable of SageMaker's container."""
    if len(script) > LONGEST_VARIABLE:
        raise ValueError("mixture: a SageMaker job has no room for this many texts; prepare them together")
    return script


def _s3_address(request: JobRequest, path: str) -> str:
    bucket = (request.config.bucket or "YOUR-BUCKET").removeprefix("s3://").rstrip("/")
    return f"s3://{bucket}/{path.strip('/')}"


def _channels(request: JobRequest) -> dict[str, JobText]:
    """SageMaker's channel -> the text that SageMaker copies from the bucket."""
    is_single = len(request.texts) == 1
    texts = enumerate(request.local_texts, start=1)
    return {"training" if is_single else f"text{number}": text for number, text in texts}


def _data_option(request: JobRequest) -> str:
    """The option that names the text's folders in the container."""
    folders = {text: f'"$SM_CHANNEL_{channel.upper()}"' for channel, text in _channels(request).items()}
    if not folders:
        return ""
    if all(text.weight is None for text in request.texts):
        return f"--data {' '.join(folders.values())}"
    mixed = [f"{folders.get(text) or quote(text.folder)}={text.weight}" for text in request.texts]
    return f"--mixture {' '.join(mixed)}"


# ---------------------------------------------------------------- quoting


def yaml_string(word: str) -> str:
    """`word` as a double-quoted YAML string, always on one line."""
    quoted = json.dumps(word, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)
