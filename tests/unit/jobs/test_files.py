"""The job files: as in golden/, and accepted by the rules of each target.

SkyPilot's keys are those of its documentation (docs.skypilot.co, reference/yaml-spec), because the
package takes 460 MB. Kubeflow's client drops unknown keys, so what it writes back is compared with what it
read. SageMaker's types are those of mypy-boto3-sagemaker, from botocore's model; lengths and patterns are
those of the API's reference. `pytest -n0 tests/unit/jobs/test_files.py --golden-update` rewrites golden/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubeflow.training.api_client import ApiClient

from overnight.jobs.targets import (
    CPU_INSTANCE,
    INSTANCES,
    JobRequest,
    find_instance,
    job_file,
    submit_command,
    yaml_string,
)
from overnight.preparation.prepare_commands import JobText
from overnight.terminal import join_words, quote

Build = Callable[..., JobRequest]
Check = Callable[[str, str], None]

GOLDEN = Path(__file__).parent / "golden"
MIXTURE = (JobText("data/a", weight=0.5), JobText("s3://b/c d", weight=0.3), JobText("data/e", weight=0.2))
REMOTE = {"texts": (JobText("s3://b/c"),), "words": ("long", "--data", "s3://b/c")}
CASES: dict[str, dict[str, Any]] = {
    "slurm.sh": {"nodes": 2, "gpus_per_node": 4, "hours": 30.5, "partition": "gpu", "gpu": "h100"},
    "slurm-cpu.sh": {"gpus_per_node": 0, "texts": (JobText("data/notes"),)},
    "skypilot.yaml": {"gpus_per_node": 4, "gpu": "A100-80GB", "bucket": "mine", "max_restarts": 5},
    "skypilot-nodes.yaml": {
        "nodes": 4,
        "gpus_per_node": 0,
        "shared_disk": "10.0.0.2:/runs",
        "run_name": "a: b",
    },
    "skypilot-bucket.yaml": {"bucket": "gs://mine", "texts": (JobText("data/notes"),)},
    "kubernetes.yaml": {"nodes": 2, "gpus_per_node": 4, "image": "mine:1"},
    "kubernetes-cpu.yaml": {"gpus_per_node": 0, "shared_disk": "team", "run_name": "a: b"},
    "sagemaker.yaml": {"bucket": "s3://mine/", "image": "1.dkr.ecr.amazonaws.com/a:1", "hours": 1.5},
    "sagemaker-nodes.yaml": {"nodes": 2, "shared_disk": "fs-1", "role": "arn:aws:iam::111122223333:role/a"},
    "sagemaker-mixture.yaml": {"gpus_per_node": 0, "texts": MIXTURE},
    "sagemaker-remote.yaml": REMOTE,
}


SKYPILOT_KEYS = {
    "task": {*["name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"]},
    "resources": {*["accelerators", "cpus", "use_spot", "disk_size", "job_recovery"]},
    "job_recovery": {"strategy", "max_restarts_on_errors"},
    "/overnight": {"name", "source", "mode"},
}
KUBERNETES_KINDS = {
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "PyTorchJob": "KubeflowOrgV1PyTorchJob",
}


def check_slurm(job: str) -> None:
    """The head by sbatch's rules: options up to the first command, unknown ones refused."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("job-name", "output", "open-mode", "gpus-per-node", "time", "signal", "partition"):
        parser.add_argument(f"--{name}")
    for name in ("nodes", "ntasks-per-node", "cpus-per-gpu"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("requeue", "exclusive"):
        parser.add_argument(f"--{name}", action="store_true")
    head = re.split(r"\n(?=[^#\n])", job)[0].splitlines()
    lines = [line.removeprefix("#SBATCH") for line in head if line.startswith("#SBATCH")]
    options = parser.parse_args([word for line in lines for word in shlex.split(line, comments=True)])
    assert head[0] == "#!/bin/bash"
    assert options.requeue
    assert options.nodes >= 1
    assert re.fullmatch(r"\d+-\d\d:\d\d:\d\d", options.time)


def check_skypilot(task: dict[str, Any], name: str = "task") -> None:
    """The keys of all sections are known; a name and the variables are free."""
    assert name not in SKYPILOT_KEYS or {*task} <= SKYPILOT_KEYS[name]
    for key, value in task.items():
        if isinstance(value, dict):
            check_skypilot(value, key)


def check_kubernetes(document: Any) -> None:
    client = ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(document)), KUBERNETES_KINDS[document["kind"]])
    assert client.sanitize_for_serialization(read) == document


def check_sagemaker_limits(job: dict[str, Any]) -> None:
    """What the types do not express."""
    assert re.fullmatch("[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", job["TrainingJobName"])
    assert re.fullmatch(r"arn:aws[a-z\-]*:iam::\d{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+", job["RoleArn"])
    container = job["AlgorithmSpecification"]
    for words in (container["ContainerEntrypoint"], container["ContainerArguments"]):
        assert 1 <= len(words) <= 100
        assert all(len(word) <= 256 and re.fullmatch(".*", word) for word in words)
    assert len(job["Environment"]) <= 100
    assert all(len(value) <= 512 for value in job["Environment"].values())
    channels = job.get("InputDataConfig", [])
    assert all(re.fullmatch("[A-Za-z0-9]{1,64}", channel["ChannelName"]) for channel in channels)
    stopping = job["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] >= stopping["MaxRuntimeInSeconds"], "required for spot machines"


@pytest.fixture(scope="module")
def sagemaker_types() -> Iterator[Callable[[str], Any]]:
    """sagemaker_types(module): of mypy_boto3_sagemaker, without its client, which needs botocore."""
    name = "mypy_boto3_sagemaker"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[name] = package
    yield lambda module: importlib.import_module(f"{name}.{module}")
    for module in [known for known in sys.modules if known.startswith(name)]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def check(sagemaker_types: Any) -> Check:
    """check(target, job): fails unless the target accepts the file."""
    request = pydantic.TypeAdapter(sagemaker_types("type_defs").CreateTrainingJobRequestTypeDef)

    def check(target: str, job: str) -> None:
        if target == "slurm":
            check_slurm(job)
            return
        for document in yaml.safe_load_all(job):
            if target == "skypilot":
                check_skypilot(document)
            elif target == "kubernetes":
                check_kubernetes(document)
            else:
                request.validate_python(document, strict=True, extra="forbid")
                check_sagemaker_limits(document)

    return check


@pytest.mark.parametrize("name", CASES)
def test_file_is_the_golden_one_and_is_accepted(
    name: str, request_job: Build, check: Check, pytestconfig: pytest.Config
) -> None:
    target = re.split("[-.]", name)[0]
    job = job_file(target, request_job(**CASES[name]))
    if pytestconfig.getoption("--golden-update"):
        (GOLDEN / name).write_text(job)
    assert job == (GOLDEN / name).read_text()
    check(target, job)


@pytest.mark.parametrize(
    "target, right, wrong",
    [
        ("slurm", "--requeue", "--requeu-it"),
        ("skypilot", "use_spot:", "use_spots:"),
        ("skypilot", "max_restarts_on_errors", "max_restarts"),
        ("kubernetes", "maxRestarts:", "maxRestart:"),
        ("kubernetes", "workingDir:", "workDir:"),
        ("sagemaker", "InstanceType:", "InstanceTyp:"),
        ("sagemaker", "ml.p5.48xlarge", "ml.p5.47xlarge"),
        ("sagemaker", "InstanceCount: 1", 'InstanceCount: "1"'),
    ],
)
def test_the_check_finds_what_is_wrong(
    target: str, right: str, wrong: str, request_job: Build, check: Check
) -> None:
    job = job_file(target, request_job())
    assert right in job
    with pytest.raises((pydantic.ValidationError, AssertionError, SystemExit)):
        check(target, job.replace(right, wrong))


def test_every_sagemaker_instance_exists(sagemaker_types: Any) -> None:
    known = sagemaker_types("literals").TrainingInstanceTypeType.__args__
    assert {CPU_INSTANCE, *(name for kinds in INSTANCES.values() for name in kinds.values())} <= {*known}
    assert find_instance("h100", 8) == INSTANCES["H100"][8]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"gpu": "H300"}, "gpu=H300.* did you mean H"),
        ({"gpu": "h100", "gpus_per_node": 4}, "gpus_per_node=4.* 1 or 8 H100"),
        ({"hours": 700}, "hours=700.* 672"),
        ({"words": ("long", "x" * 257)}, "256 characters"),
        ({"words": ("long", "two\nlines")}, "line break"),
        ({"words": ("long", *100 * ["x"])}, "100 .* 101"),
        ({"texts": tuple(JobText(f"data/{n}", weight=1.0) for n in range(20))}, "mixture"),
    ],
)
def test_sagemaker_limits_are_refused(values: dict[str, Any], message: str, request_job: Build) -> None:
    with pytest.raises(ValueError, match=message):
        job_file("sagemaker", request_job(**values))


def test_sagemaker_text_is_uploaded_first(request_job: Build) -> None:
    assert submit_command("sagemaker", request_job(path="my jobs/a", bucket="mine")) == (
        "aws s3 sync data/notes s3://mine/data/notes && "
        "aws sagemaker create-training-job --cli-input-yaml 'file://my jobs/a' "
        '--training-job-name "mine-$(date +%Y%m%d-%H%M%S)"'
    )


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_every_word_stays_what_it_is_on_one_line(word: str) -> None:
    assert len(quote(word).splitlines()) == 1
    assert len(yaml_string(word).splitlines()) == 1
    assert yaml.safe_load(f"key: {yaml_string(word)}") == {"key": word}


def test_bash_reads_every_word_unchanged() -> None:
    words = ["", "a b", "it's", 'a "b"', "$HOME", "$(ls)", "new\nline", "tab\t\\n", "é\u2028x", "*"]
    script = f"printf '%s\\0' {join_words(words)}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert shown.stdout.decode().split("\0")[:-1] == words


def test_name_is_allowed_by_all_targets(request_job: Build) -> None:
    names = {"gpt2-124m": "gpt2-124m", "My Run_2": "my-run-2", "2nd": "run-2nd", "---": "run", "é": "run"}
    names |= {"a" * 80: "a" * 45, "a" * 44 + ".b": "a" * 44}
    assert {run_name: request_job(run_name=run_name).name for run_name in names} == names
