"""The job files, read by the rules of each target: what they ask for, and that their keys are known.

SkyPilot's schema is written after its documentation (docs.skypilot.co, reference/yaml-spec), because the
package takes 460 MB. Kubeflow's client drops unknown keys, so what it writes back is compared with what it
read. SageMaker's types are those of mypy-boto3-sagemaker, from botocore's model; lengths and patterns are
those of the API's reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml
from kubeflow.training.api_client import ApiClient

from overnight.jobs.request import JobRequest
from overnight.jobs.targets import CPU_INSTANCE, INSTANCES, find_instance, job_file, submit_command
from overnight.preparation.prepare_commands import JobText

Build = Callable[..., JobRequest]


def only(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    keys = {"properties": properties, "required": list(required)}
    return {"type": "object", "additionalProperties": False, **keys}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
BUCKET = only(
    "mode",
    name={"type": "string", "pattern": "^([a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|YOUR-BUCKET)$"},
    source={"type": "string", "pattern": "^(s3|gs|r2|cos|oci|https)://"},
    mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
)
RESOURCES = only(
    accelerators={"type": "string", "pattern": "^[A-Z0-9-]+:[0-9]+$"},
    cpus={"type": "string", "pattern": r"^[0-9]+\+?$"},
    use_spot={"type": "boolean"},
    disk_size=COUNT,
    job_recovery=only(
        strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
        max_restarts_on_errors={"type": "integer", "minimum": 0},
    ),
)
SKYPILOT_TASK = only(
    "run",
    name={"type": "string", "pattern": "^[a-zA-Z0-9]+(?:[._-]{1,2}[a-zA-Z0-9]+)*$"},
    workdir=TEXT,
    num_nodes=COUNT,
    resources=RESOURCES,
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    file_mounts={"type": "object", "additionalProperties": {"oneOf": [TEXT, BUCKET]}},
    setup=TEXT,
    run=TEXT,
)
KUBERNETES_KINDS = {
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "PyTorchJob": "KubeflowOrgV1PyTorchJob",
}


def check_skypilot(task: Any) -> None:
    jsonschema.validate(task, SKYPILOT_TASK)


def check_kubernetes(document: Any) -> None:
    client = ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(document)), KUBERNETES_KINDS[document["kind"]])
    assert client.sanitize_for_serialization(read) == document


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
def check(sagemaker_types: Any) -> Callable[[str, Any], None]:
    """check(target, document): fails unless the target accepts it."""
    request = pydantic.TypeAdapter(sagemaker_types("type_defs").CreateTrainingJobRequestTypeDef)

    def check_sagemaker(job: Any) -> None:
        request.validate_python(job, strict=True, extra="forbid")
        check_sagemaker_limits(job)

    checks = {"skypilot": check_skypilot, "kubernetes": check_kubernetes, "sagemaker": check_sagemaker}
    return lambda target, document: checks[target](document)


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


@pytest.fixture
def read(request_job: Build, check: Callable[[str, Any], None]) -> Callable[..., Any]:
    """read(target, **values) -> the checked file of such a job; of several documents the last."""

    def load(target: str, **values: Any) -> Any:
        documents = list(yaml.safe_load_all(job_file(target, request_job(**values))))
        for document in documents:
            check(target, document)
        return documents[-1]

    return load


@pytest.mark.parametrize(
    "target, right, wrong",
    [
        ("skypilot", "use_spot:", "use_spots:"),
        ("skypilot", "max_restarts_on_errors", "max_restarts"),
        ("skypilot", "H100:8", "H100"),
        ("kubernetes", "maxRestarts:", "maxRestart:"),
        ("kubernetes", "workingDir:", "workDir:"),
        ("sagemaker", "InstanceType:", "InstanceTyp:"),
        ("sagemaker", "ml.p5.48xlarge", "ml.p5.47xlarge"),
        ("sagemaker", "InstanceCount: 1", 'InstanceCount: "1"'),
    ],
)
def test_the_check_finds_what_is_wrong(
    target: str, right: str, wrong: str, request_job: Build, check: Callable[[str, Any], None]
) -> None:
    job = job_file(target, request_job())
    assert right in job
    *_, document = yaml.safe_load_all(job.replace(right, wrong))
    with pytest.raises((jsonschema.ValidationError, pydantic.ValidationError, AssertionError)):
        check(target, document)


def test_special_characters_stay_what_they_are(read: Any) -> None:
    words = ("long", "--sample-prompts", "it's: # no comment", "two\nlines", "\u2028", "{{ x }}")
    task = read("skypilot", run_name="a: b", words=words)
    job = read("kubernetes", run_name="a: b", words=words)
    assert task["name"] == job["metadata"]["name"] == "a-b"
    for script in (task["setup"], task["run"], *container_of(job)["args"]):
        subprocess.run(["bash", "-n"], input=script.replace("$$", "$"), text=True, check=True)


def test_skypilot_task_of_one_node_and_of_several(read: Any) -> None:
    task = read("skypilot", gpus_per_node=4, gpu="A100-80GB", bucket="mine", max_restarts=5)
    assert task["resources"]["accelerators"] == "A100-80GB:4"
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 5
    assert task["file_mounts"] == {"/overnight": {"name": "mine", "mode": "MOUNT_CACHED"}}
    assert read("skypilot", bucket="gs://mine")["file_mounts"]["/overnight"]["source"] == "gs://mine"
    task = read("skypilot", nodes=4, gpus_per_node=0, shared_disk="10.0.0.2:/runs")
    assert task["num_nodes"] == 4
    assert "file_mounts" not in task
    assert task["envs"] == {"SHARED_DISK": "10.0.0.2:/runs"}
    assert "accelerators" not in task["resources"]
    assert "--nproc-per-node 1 " in task["run"]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("disk", [None, "team"])
def test_kubernetes_job_has_its_pods_gpus_and_volume(disk: str | None, read: Any, request_job: Build) -> None:
    values = {"nodes": 2, "gpus_per_node": 4, "image": "mine:1", "shared_disk": disk}
    job = read("kubernetes", **values)
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    container = container_of(job)
    assert (container["name"], container["image"]) == ("pytorch", "mine:1"), "the operator needs this name"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert "resources" not in container_of(read("kubernetes", gpus_per_node=0))
    *claims, _ = yaml.safe_load_all(job_file("kubernetes", request_job(**values)))
    assert [claim["spec"]["accessModes"] for claim in claims] == ([] if disk else [["ReadWriteMany"]])
    volumes = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == (disk or claims[0]["metadata"]["name"])


def test_sagemaker_job_of_one_host_and_of_several(read: Any) -> None:
    job = read("sagemaker", bucket="s3://mine/", image="1.dkr.ecr.amazonaws.com/a:1", hours=1.5)
    assert job["ResourceConfig"]["InstanceType"] == "ml.p5.48xlarge"
    assert job["EnableManagedSpotTraining"]
    assert job["StoppingCondition"]["MaxRuntimeInSeconds"] == 5400
    assert job["CheckpointConfig"] == {"LocalPath": "/opt/ml/checkpoints", "S3Uri": "s3://mine/runs/"}
    (channel,) = job["InputDataConfig"]
    assert channel["ChannelName"] == "training"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://mine/data/notes/"
    assert "VpcConfig" not in job
    job = read("sagemaker", nodes=2, shared_disk="fs-1", role="arn:aws:iam::111122223333:role/a")
    assert job["ResourceConfig"]["InstanceCount"] == 2
    assert "CheckpointConfig" not in job, "it is each host's own, and they write into one checkpoint"
    disk = job["InputDataConfig"][1]["DataSource"]["FileSystemDataSource"]
    assert (disk["FileSystemAccessMode"], disk["FileSystemId"]) == ("rw", "fs-1")
    assert read("sagemaker", gpus_per_node=0)["ResourceConfig"]["InstanceType"] == CPU_INSTANCE


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


def test_sagemaker_channels_of_texts(read: Any, request_job: Build) -> None:
    texts = (
        JobText("data/a", weight=0.5),
        JobText("s3://b/c d", weight=0.25),
        JobText("data/e", weight=0.25),
    )
    job = read("sagemaker", texts=texts)
    assert [channel["ChannelName"] for channel in job["InputDataConfig"]] == ["text1", "text2"]
    mixture = """--mixture "$SM_CHANNEL_TEXT1"=0.5 's3://b/c d'=0.25 "$SM_CHANNEL_TEXT2"=0.25"""
    assert mixture in job["Environment"]["OVERNIGHT_TRAIN"]
    job = read("sagemaker", texts=(JobText("s3://b/c"),), words=("long", "--data", "s3://b/c"))
    assert "InputDataConfig" not in job
    assert "--data" not in job["Environment"]["OVERNIGHT_TRAIN"]
    assert submit_command("sagemaker", request_job(path="my jobs/a", bucket="mine")) == (
        "aws s3 sync data/notes s3://mine/data/notes && "
        "aws sagemaker create-training-job --cli-input-yaml 'file://my jobs/a' "
        '--training-job-name "mine-$(date +%Y%m%d-%H%M%S)"'
    )
