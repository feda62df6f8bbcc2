"""The PyTorchJob, read by the models of Kubeflow's own client, and run as its operator starts it.

Those models drop a key that they do not know, so what they write back is compared with what they read. The
operator's definition of the resource (v1.9.0, its OpenAPI schema made strict) was given the files by hand as
well, and took them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubeflow.training.api_client import ApiClient

from overnight.jobs.kubernetes import kubernetes_submit_command, write_kubernetes_job
from overnight.jobs.request import JobRequest

BUILD = Callable[..., JobRequest]
KINDS = {"PersistentVolumeClaim": "V1PersistentVolumeClaim", "PyTorchJob": "KubeflowOrgV1PyTorchJob"}


def through_client(document: dict[str, Any]) -> Any:
    """The document as Kubeflow's client understands it."""
    client = ApiClient()
    found = client.deserialize(SimpleNamespace(data=json.dumps(document)), KINDS[document["kind"]])
    return client.sanitize_for_serialization(found)


def read(request: JobRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the job, its container), all documents checked."""
    documents = list(yaml.safe_load_all(write_kubernetes_job(request)))
    for document in documents:
        assert through_client(document) == document
    job = documents[-1]
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return job, container


def test_the_job_has_its_pods_and_gpus(request_job: BUILD) -> None:
    job, container = read(request_job(nodes=2, gpus_per_node=4, image="mine:1", run_name="My Run"))
    assert (job["apiVersion"], job["metadata"]["name"]) == ("kubeflow.org/v1", "my-run")
    assert job["spec"]["nprocPerNode"] == "4"
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    policy = job["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["maxRestarts"]) == (2, 2, 3)
    assert container["name"] == "pytorch", "the operator knows it by this name"
    assert container["image"] == "mine:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}


def test_the_volume_is_claimed_unless_there_is_one(request_job: BUILD) -> None:
    claim, job = yaml.safe_load_all(write_kubernetes_job(request_job()))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (job,) = yaml.safe_load_all(write_kubernetes_job(request_job(shared_disk="team")))
    volumes = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == "team"


def test_a_job_without_gpus_asks_for_none(request_job: BUILD) -> None:
    job, container = read(request_job(gpus_per_node=0))
    assert "resources" not in container
    assert job["spec"]["nprocPerNode"] == "1"


@pytest.mark.parametrize("right, wrong", [("maxRestarts", "maxRestart"), ("workingDir", "workDir")])
def test_the_client_finds_what_is_wrong(right: str, wrong: str, request_job: BUILD) -> None:
    *_, job = yaml.safe_load_all(write_kubernetes_job(request_job()).replace(f"{right}:", f"{wrong}:"))
    assert through_client(job) != job


def expand(argument: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of $(NAME) and $$ in a container's arguments."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, argument)


@pytest.fixture
def start_pod(machines: Any, free_port: int) -> Callable[..., Any]:
    """Starts a pod on this machine, with the variables of the operator (pkg/controller.v1/pytorch)."""

    def start(request: JobRequest, index: int) -> subprocess.Popen[str]:
        job, container = read(request)
        policy = job["spec"]["elasticPolicy"]
        variables = {each["name"]: each["value"] for each in container["env"]} | {
            "HOSTNAME": f"{job['metadata']['name']}-worker-{index}",
            "PET_RDZV_BACKEND": policy["rdzvBackend"],
            "PET_RDZV_ENDPOINT": f"localhost:{free_port}",
            "PET_RDZV_CONF": ",".join(f"{each['key']}={each['value']}" for each in policy["rdzvConf"]),
            "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
            "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"],
            "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        }
        words = [expand(word, variables) for word in container["command"] + container["args"]]
        process: subprocess.Popen[str] = machines.start(*words, **variables)
        return process

    return start


def test_the_first_pod_prepares_and_both_begin(
    machines: Any, request_job: BUILD, start_pod: Callable[..., Any], ended: Any
) -> None:
    request = request_job(nodes=2, words=("short", "--sample-prompts", "$$5", "$(PET_NNODES)", "$HOME"))
    both = [start_pod(request, index) for index in (1, 0)]
    assert [ended(process)[0] for process in both] == [0, 0]
    words = [told["words"] for told in machines.noted("told")]
    begun = ["train", "short", "--sample-prompts", "$$5", "$(PET_NNODES)", "$HOME"]
    assert words == [["prepare", "notes"], begun, begun]
    assert machines.noted("torchrun") == 2 * [["--no-python", "bash", "-c", "train"]]


def test_two_pods_meet_and_save_when_they_are_taken_away(
    machines: Any, request_job: BUILD, start_pod: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    """By torchrun's own rendezvous, from the operator's variables alone."""
    machines.use_real_torchrun()
    request = request_job(nodes=2, gpus_per_node=1)
    both = [start_pod(request, index) for index in (0, 1)]
    machines.wait_for("told", 2, both[0])
    places = sorted((told["RANK"], told["WORLD_SIZE"]) for told in machines.noted("told"))
    assert places == [("0", "2"), ("1", "2")]
    for process in both:
        process.terminate()
    assert all(ended(process)[0] > 0 for process in both), "a pod that succeeds would end the job"
    assert sorted(machines.noted("saved")) == [0, 1]


def test_a_stop_on_another_node_is_no_success(
    machines: Any, request_job: BUILD, start_pod: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    """All processes save and end well when one was told to: only the run's files say that it is not done."""
    machines.add("torchrun", "")
    assert ended(start_pod(request_job(), 0))[0] == 1
    (machines.work / "runs/mine").mkdir(parents=True)
    (machines.work / "runs/mine/finished").touch()
    assert ended(start_pod(request_job(), 0))[0] == 0


def test_an_error_is_the_pods_own(
    machines: Any, request_job: BUILD, start_pod: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    assert ended(start_pod(request_job(words=("wrong",)), 0))[0] == 2


def test_it_is_submitted_by_kubectl(request_job: BUILD) -> None:
    assert kubernetes_submit_command(request_job(path="a.yaml")) == "kubectl apply -f a.yaml"
