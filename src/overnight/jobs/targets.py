"""Fills a job file's template: a function gives the values that only one target needs."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from overnight.config import nearest
from overnight.jobs.request import SAVE_SECONDS, JobRequest, join_words, quote, yaml_string
from overnight.preparation.prepare_commands import JobText

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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("overnight.jobs"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # shell and YAML: values pass through `quote` and `yaml`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
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
