"""The request, checked against AWS's own description of it and run in folders that stand for containers.

The types are those of mypy-boto3-sagemaker, which is generated from botocore's model of the service: keys,
what is required, the values of enumerations. Lengths and patterns are those of the API's reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import yaml

from overnight.jobs.request import JobRequest
from overnight.jobs.sagemaker import (
    INSTANCES,
    WITHOUT_GPU,
    find_instance,
    sagemaker_submit_command,
    write_sagemaker_job,
)
from overnight.preparation.prepare_commands import JobText

BUILD = Callable[..., JobRequest]


@pytest.fixture(scope="module")
def types() -> Iterator[Any]:
    """The package's types without its client, which would want botocore."""
    name = "mypy_boto3_sagemaker"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[name] = package
    yield importlib.import_module(f"{name}.type_defs")
    for module in [known for known in sys.modules if known.startswith(name)]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def validate(types: Any) -> Callable[[Any], None]:
    adapter = pydantic.TypeAdapter(types.CreateTrainingJobRequestTypeDef)

    def check(job: Any) -> None:
        adapter.validate_python(job, strict=True, extra="forbid")
        check_limits(job)

    return check


def check_limits(job: dict[str, Any]) -> None:
    """What a type does not say."""
    assert re.fullmatch("[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", job["TrainingJobName"])
    assert re.fullmatch(r"arn:aws[a-z\-]*:iam::\d{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+", job["RoleArn"])
    container = job["AlgorithmSpecification"]
    for words in (container["ContainerEntrypoint"], container["ContainerArguments"]):
        assert 1 <= len(words) <= 100
        assert all(len(word) <= 256 and re.fullmatch(".*", word) for word in words)
    assert len(job["Environment"]) <= 100
    assert all(len(value) <= 512 for value in job["Environment"].values())
    assert all(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) for name in job["Environment"])
    channels = job.get("InputDataConfig", [])
    assert all(re.fullmatch("[A-Za-z0-9]{1,64}", channel["ChannelName"]) for channel in channels)
    stopping = job["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] >= stopping["MaxRuntimeInSeconds"], "as spot machines ask"


@pytest.fixture
def read(validate: Callable[[Any], None]) -> Callable[[JobRequest], dict[str, Any]]:
    def load(request: JobRequest) -> dict[str, Any]:
        job: dict[str, Any] = yaml.safe_load(write_sagemaker_job(request))
        validate(job)
        return job

    return load


def test_one_host_keeps_its_checkpoints_in_the_bucket(request_job: BUILD, read: Any) -> None:
    job = read(request_job(bucket="s3://mine/", image="1.dkr.ecr.amazonaws.com/a:1", hours=1.5))
    assert job["ResourceConfig"]["InstanceType"] == "ml.p5.48xlarge"
    assert job["EnableManagedSpotTraining"]
    assert job["StoppingCondition"]["MaxRuntimeInSeconds"] == 5400
    assert job["CheckpointConfig"] == {"LocalPath": "/opt/ml/checkpoints", "S3Uri": "s3://mine/runs/"}
    (channel,) = job["InputDataConfig"]
    assert channel["ChannelName"] == "training"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://mine/data/notes/"
    assert "VpcConfig" not in job


def test_several_hosts_share_a_disk(request_job: BUILD, read: Any) -> None:
    job = read(
        request_job(nodes=2, shared_disk="fs-0123456789abcdef0", role="arn:aws:iam::111122223333:role/a")
    )
    assert job["ResourceConfig"]["InstanceCount"] == 2
    assert "CheckpointConfig" not in job, "it is each host's own, and they write into one checkpoint"
    _, runs = job["InputDataConfig"]
    assert runs["DataSource"]["FileSystemDataSource"]["FileSystemAccessMode"] == "rw"
    assert runs["DataSource"]["FileSystemDataSource"]["FileSystemId"] == "fs-0123456789abcdef0"


def test_every_instance_exists(types: Any, request_job: BUILD, read: Any) -> None:
    known = importlib.import_module("mypy_boto3_sagemaker.literals").TrainingInstanceTypeType.__args__
    for gpu, kinds in INSTANCES.items():
        for count, instance in kinds.items():
            assert find_instance(gpu.lower(), count) == instance
            assert instance in known
    assert WITHOUT_GPU in known
    assert read(request_job(gpus_per_node=0))["ResourceConfig"]["InstanceType"] == WITHOUT_GPU


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"gpu": "H300"}, "gpu=H300 is of no SageMaker instance that is known; did you mean H"),
        ({"gpu": "h100", "gpus_per_node": 4}, "gpus_per_node=4: SageMaker has instances with 1 or 8 H100"),
        ({"hours": 700}, "hours=700: a SageMaker job has at most 672"),
        ({"words": ("long", "x" * 257)}, "an option has at most 256 characters"),
        ({"words": ("long", "two\nlines")}, "no line break; put it into a recipe"),
        ({"words": ("long", *100 * ["x"])}, "passes on 100 words, and the run has 101"),
        (
            {"texts": tuple(JobText(f"data/{n}", weight=1.0) for n in range(20))},
            "sources: 20 texts do not fit",
        ),
    ],
)
def test_what_sagemaker_has_no_room_for_is_refused(
    settings: dict[str, Any], sentence: str, request_job: BUILD
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_sagemaker_job(request_job(**settings))


@pytest.mark.parametrize(
    "wrong", ["InstanceTyp: ml.p5.48xlarge", "InstanceType: ml.p5.47xlarge", 'InstanceCount: "2"']
)
def test_the_types_find_what_is_wrong(
    wrong: str, request_job: BUILD, validate: Callable[[Any], None]
) -> None:
    job = write_sagemaker_job(request_job())
    changed = re.sub(f"^  {wrong[:10]}.*: .*$", f"  {wrong}", job, flags=re.MULTILINE)
    assert changed != job
    with pytest.raises(pydantic.ValidationError):
        validate(yaml.safe_load(changed))


def test_a_mixture_has_a_channel_for_each_text(request_job: BUILD, read: Any) -> None:
    texts = (
        JobText("data/a", weight=0.5),
        JobText("s3://b/c d", weight=0.25),
        JobText("data/e", weight=0.25),
    )
    job = read(request_job(texts=texts))
    assert [channel["ChannelName"] for channel in job["InputDataConfig"]] == ["text1", "text2"]
    mixed = """--mixture "$SM_CHANNEL_TEXT1"=0.5 's3://b/c d'=0.25 "$SM_CHANNEL_TEXT2"=0.25"""
    assert mixed in job["Environment"]["OVERNIGHT_TRAIN"]


def test_text_at_a_url_needs_no_channel(request_job: BUILD, read: Any) -> None:
    job = read(request_job(texts=(JobText("s3://b/c"),), words=("long", "--data", "s3://b/c")))
    assert "InputDataConfig" not in job
    assert "--data" not in job["Environment"]["OVERNIGHT_TRAIN"]
    assert "training-job" in sagemaker_submit_command(request_job(texts=(JobText("s3://b/c"),)))


@pytest.fixture
def start_host(machines: Any, free_port: int, tmp_path: Path) -> Callable[..., Any]:
    """Starts one host's container in a folder that stands for its /opt/ml."""
    runs = machines.work / "runs"

    def start(job: dict[str, Any], host: str, hosts: list[str], **more: str) -> subprocess.Popen[str]:
        root = tmp_path / f"ml-{host}"
        (root / "input/config").mkdir(parents=True, exist_ok=True)
        told = {"current_host": host, "hosts": hosts, "network_interface_name": "eth0"}
        (root / "input/config/resourceconfig.json").write_text(json.dumps(told))
        for place in ("input/data/runs", "checkpoints"):
            (root / place).parent.mkdir(exist_ok=True, parents=True)
            (root / place).unlink(missing_ok=True)
            (root / place).symlink_to(runs)
        runs.mkdir(exist_ok=True)
        here = {
            name: value.replace("/opt/ml", str(root)).replace(":29500", f":{free_port}")
            for name, value in job["Environment"].items()
        }
        container = job["AlgorithmSpecification"]
        words = container["ContainerEntrypoint"] + container["ContainerArguments"]
        process: subprocess.Popen[str] = machines.start(*words, **here, **more)
        return process

    return start


def test_a_host_trains_and_leaves_the_model(
    machines: Any,
    request_job: BUILD,
    read: Any,
    start_host: Callable[..., Any],
    ended: Any,
    tmp_path: Path,
    parse_torchrun: Callable[[list[str]], Any],
) -> None:
    job = read(request_job(words=("short", "--sample-prompts", "it's $5", "")))
    status, said = ended(start_host(job, "algo-1", ["algo-1"]))
    assert status == 0, said
    data, model = (f"{tmp_path}/ml-algo-1/{place}" for place in ("input/data/training", "model/hf"))
    assert [told["words"] for told in machines.noted("told")] == [
        ["train", "short", "--sample-prompts", "it's $5", "", "--data", data],
        ["convert", "runs/mine", "--out", model],
    ]
    (words,) = machines.noted("torchrun")
    node = parse_torchrun(words)
    assert (node.nnodes, node.nproc_per_node, node.max_restarts) == ("1", "8", 3)
    assert (node.rdzv_backend, node.rdzv_conf, node.local_addr) == ("c10d", "is_host=1", "algo-1")


def test_what_the_toolkit_sets_comes_first(
    machines: Any, request_job: BUILD, read: Any, start_host: Callable[..., Any], ended: Any
) -> None:
    toolkit = {
        "SM_HOSTS": '["algo-2", "algo-1"]',
        "SM_CURRENT_HOST": "algo-2",
        "SM_CHANNEL_TRAINING": "/elsewhere",
        "SM_CHANNEL_RUNS": str(machines.work / "shared"),
    }
    job = read(request_job(nodes=2, words=("short",)))
    status, said = ended(start_host(job, "other", ["other"], **toolkit))
    assert status == 0, said
    (words,) = machines.noted("torchrun")
    assert [words[words.index(option) + 1] for option in ("--nnodes", "--local-addr", "--rdzv-conf")] == [
        "2",
        "algo-2",
        "is_host=0",
    ]
    assert [told["words"] for told in machines.noted("told")] == [["train", "short", "--data", "/elsewhere"]]
    assert (machines.work / "shared/mine/finished").exists()


def test_a_stopped_job_saves_and_its_next_one_goes_on(
    machines: Any, request_job: BUILD, read: Any, start_host: Callable[..., Any], ended: Any
) -> None:
    job = read(request_job())
    process = start_host(job, "algo-1", ["algo-1"])
    machines.wait_for("told", 1, process)
    process.terminate()
    assert ended(process)[0] > 0
    assert machines.noted("saved") == [0]
    assert ended(start_host(job, "algo-1", ["algo-1"]))[0] == 0
    words = [told["words"][:3] for told in machines.noted("told")[1:]]
    assert words == [["train", "--resume", "runs/mine"], ["convert", "runs/mine", "--out"]]


def test_two_hosts_meet(
    machines: Any, request_job: BUILD, read: Any, start_host: Callable[..., Any], ended: Any
) -> None:
    """By torchrun's own rendezvous."""
    machines.use_real_torchrun()
    job = read(request_job(nodes=2, gpus_per_node=1, gpu="H100", words=("short",)))
    hosts = ["localhost", "127.0.0.1"]
    for status, said in [ended(process) for process in [start_host(job, host, hosts) for host in hosts]]:
        assert status == 0, said
    told = machines.noted("told")
    assert sorted((each["RANK"], each["WORLD_SIZE"]) for each in told[:2]) == [("0", "2"), ("1", "2")]
    assert [each["words"][0] for each in told] == ["train", "train", "convert"]


def test_the_text_is_sent_before_the_request(request_job: BUILD) -> None:
    assert sagemaker_submit_command(request_job(path="a.yaml", bucket="mine")) == (
        "aws s3 sync data/notes s3://mine/data/notes && "
        "aws sagemaker create-training-job --cli-input-yaml file://a.yaml "
        '--training-job-name "mine-$(date +%Y%m%d-%H%M%S)"'
    )
