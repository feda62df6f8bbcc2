"""The scripts of SkyPilot, Kubernetes and SageMaker, run here with the variables that each sets."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from overnight.jobs.targets import JobRequest, job_file

Build = Callable[..., JobRequest]
Start = Callable[..., subprocess.Popen[str]]
HOSTS = ["127.0.0.1", "localhost"]
ON_EACH_TARGET = pytest.mark.parametrize("target", ["skypilot", "kubernetes", "sagemaker"])


@pytest.fixture
def start(machines: Any, free_port: int, tmp_path: Path) -> Start:
    """start(target, request, rank=0, **variables): one node's process of such a job."""

    def skypilot(task: Any, rank: int, nodes: int) -> tuple[list[str], dict[str, str]]:
        activate = machines.work / "home/venv/bin/activate"
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.touch()
        script = task["run"].replace("cd /overnight\n", "").replace(":29500", f":{free_port}")
        return ["bash", "-c", script], {
            "HOME": str(machines.work / "home"),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "\n".join(HOSTS[:nodes]),
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_TASK_ID": "sky-1",
        }

    def kubernetes(job: Any, rank: int, nodes: int) -> tuple[list[str], dict[str, str]]:
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        policy = job["spec"]["elasticPolicy"]
        variables = {each["name"]: each["value"] for each in container["env"]} | {
            "HOSTNAME": f"{job['metadata']['name']}-worker-{rank}",
            # As the operator sets them (pkg/controller.v1/pytorch).
            "PET_RDZV_BACKEND": policy["rdzvBackend"],
            "PET_RDZV_ENDPOINT": f"localhost:{free_port}",
            "PET_RDZV_CONF": ",".join(f"{each['key']}={each['value']}" for each in policy["rdzvConf"]),
            "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
            "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"],
            "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        }
        return [expand(word, variables) for word in container["command"] + container["args"]], variables

    def sagemaker(job: Any, rank: int, nodes: int) -> tuple[list[str], dict[str, str]]:
        root, runs = tmp_path / f"ml-{rank}", machines.work / "runs"
        (root / "input/config").mkdir(parents=True, exist_ok=True)
        hosts = {"current_host": HOSTS[rank], "hosts": HOSTS[:nodes], "network_interface_name": "eth0"}
        (root / "input/config/resourceconfig.json").write_text(json.dumps(hosts))
        runs.mkdir(exist_ok=True)
        for place in (root / "input/data/runs", root / "checkpoints"):
            place.parent.mkdir(exist_ok=True, parents=True)
            place.unlink(missing_ok=True)
            place.symlink_to(runs)
        variables = {
            name: value.replace("/opt/ml", str(root)).replace(":29500", f":{free_port}")
            for name, value in job["Environment"].items()
        }
        container = job["AlgorithmSpecification"]
        return container["ContainerEntrypoint"] + container["ContainerArguments"], variables

    def begin(target: str, request: JobRequest, rank: int = 0, **more: str) -> subprocess.Popen[str]:
        *_, job = yaml.safe_load_all(job_file(target, request))
        node = {"skypilot": skypilot, "kubernetes": kubernetes, "sagemaker": sagemaker}[target]
        words, variables = node(job, rank, request.config.nodes)
        process: subprocess.Popen[str] = machines.start(*words, **variables | more)
        return process

    return begin


def expand(argument: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of $(NAME) and $$ in a container's arguments."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        argument,
    )


@pytest.mark.parametrize("target", ["skypilot", "kubernetes"])
def test_first_node_prepares_and_both_train(
    target: str, machines: Any, request_job: Build, start: Start, free_port: int
) -> None:
    words = (
        "short",
        "--sample-prompts",
        "$$5",
        "$(PET_NNODES)",
        "$HOME",
        "it's: # one\ntwo",
        "\u2028",
        "{{ x }}",
    )
    request = request_job(nodes=2, words=words)
    assert machines.wait(*(start(target, request, rank) for rank in (1, 0))) == [0, 0], machines.output
    assert machines.calls() == [["prepare", "notes"], *2 * [["train", *words]]]
    if target == "skypilot":
        nodes = sorted(machines.torchruns(), key=lambda node: str(node.local_addr))
        for node, host, is_host in zip(nodes, HOSTS, "10", strict=True):
            assert (node.nnodes, node.nproc_per_node, node.rdzv_backend) == ("2", "1", "c10d")
            assert (node.rdzv_endpoint, node.rdzv_id) == (f"127.0.0.1:{free_port}", "sky-1")
            assert (node.local_addr, node.rdzv_conf) == (host, f"is_host={is_host}")


@ON_EACH_TARGET
def test_only_a_finished_run_is_a_success(
    target: str, machines: Any, request_job: Build, start: Start
) -> None:
    machines.prepare_text()
    process = start(target, request_job())
    machines.wait_for_calls(1, process)
    process.terminate()
    assert machines.wait(process)[0] > 0, "a node that succeeded would end the job"
    assert machines.noted("saved") == [0]
    assert machines.wait(start(target, request_job(words=("wrong",)))) == [0], "resumed, and finished"
    assert machines.calls()[1][:3] == ["train", "--resume", "runs/mine"]
    (machines.work / "runs/mine/recipe.toml").unlink()
    assert machines.wait(start(target, request_job(words=("wrong",)))) == [2], "an error has its own status"

    machines.add("torchrun", "")  # all processes save and exit with 0 when another node is stopped
    assert machines.wait(start(target, request_job())) == [0]
    (machines.work / "runs/mine/finished").unlink()
    assert machines.wait(start(target, request_job())) == [1]


@ON_EACH_TARGET
def test_two_nodes_meet_and_save_when_they_are_stopped(
    target: str, machines: Any, request_job: Build, start: Start
) -> None:
    """By torchrun's own rendezvous, from the target's variables alone."""
    machines.use_real_torchrun()
    machines.prepare_text()
    both = [start(target, request_job(nodes=2, gpus_per_node=1), rank) for rank in (0, 1)]
    machines.wait_for_calls(2, both[0])
    ranks = sorted((call["RANK"], call["WORLD_SIZE"]) for call in machines.noted("calls"))
    assert ranks == [("0", "2"), ("1", "2")]
    for process in both:
        process.terminate()
    assert all(status > 0 for status in machines.wait(*both)), machines.output
    assert sorted(machines.noted("saved")) == [0, 1]


def test_sagemaker_host_trains_and_leaves_the_model(
    machines: Any, request_job: Build, start: Start, tmp_path: Path
) -> None:
    words = ("short", "--sample-prompts", "it's $5", "")
    assert machines.wait(start("sagemaker", request_job(words=words))) == [0], machines.output
    data, model = (f"{tmp_path}/ml-0/{place}" for place in ("input/data/training", "model/hf"))
    assert machines.calls() == [["train", *words, "--data", data], ["convert", "runs/mine", "--out", model]]
    (node,) = machines.torchruns()
    assert (node.nnodes, node.nproc_per_node, node.max_restarts) == ("1", "8", 3)
    assert (node.rdzv_backend, node.rdzv_conf, node.local_addr) == ("c10d", "is_host=1", HOSTS[0])


def test_sagemaker_toolkit_variables_come_first(machines: Any, request_job: Build, start: Start) -> None:
    toolkit = {
        "SM_HOSTS": '["algo-2", "algo-1"]',
        "SM_CURRENT_HOST": "algo-2",
        "SM_CHANNEL_TRAINING": "/elsewhere",
        "SM_CHANNEL_RUNS": str(machines.work / "shared"),
    }
    request = request_job(nodes=2, words=("short",))
    assert machines.wait(start("sagemaker", request, **toolkit)) == [0], machines.output
    (node,) = machines.torchruns()
    assert (node.nnodes, node.local_addr, node.rdzv_conf) == ("2", "algo-2", "is_host=0")
    assert machines.calls() == [["train", "short", "--data", "/elsewhere"]]
    assert (machines.work / "shared/mine/finished").exists()
