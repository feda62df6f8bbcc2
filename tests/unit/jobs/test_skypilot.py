"""The task, checked by a schema and run with programs that stand for the cloud's.

The schema is written after SkyPilot's documentation of its YAML (docs.skypilot.co, reference/yaml-spec):
SkyPilot itself takes 460 MB, too much to install for a test. Its own parser, `sky.Task.from_yaml` of version
0.14.1, was given these files by hand, for one node and for two, and took them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from overnight.jobs.request import JobRequest
from overnight.jobs.skypilot import skypilot_submit_command, write_skypilot_job
from overnight.preparation.prepare_commands import JobText


def only(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }


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
TASK = only(
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

BUILD = Callable[..., JobRequest]


def read(request: JobRequest) -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load(write_skypilot_job(request))
    jsonschema.validate(task, TASK)
    return task


def test_one_node_keeps_its_run_in_a_bucket(request_job: BUILD) -> None:
    task = read(request_job(gpus_per_node=4, gpu="A100-80GB", bucket="mine", max_restarts=5))
    assert task["resources"]["accelerators"] == "A100-80GB:4"
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 5
    assert task["file_mounts"] == {"/overnight": {"name": "mine", "mode": "MOUNT_CACHED"}}
    there = read(request_job(bucket="gs://mine"))
    assert there["file_mounts"]["/overnight"]["source"] == "gs://mine"
    assert read(request_job())["file_mounts"]["/overnight"]["name"] == "YOUR-BUCKET"


def test_several_nodes_share_a_disk(request_job: BUILD) -> None:
    task = read(request_job(nodes=4, shared_disk="10.0.0.2:/runs"))
    assert task["num_nodes"] == 4
    assert "file_mounts" not in task
    assert task["envs"] == {"SHARED_DISK": "10.0.0.2:/runs"}
    assert 'mount -t nfs4 "$SHARED_DISK" /overnight' in task["setup"]


def test_a_task_without_gpus_asks_for_processors(request_job: BUILD) -> None:
    task = read(request_job(gpus_per_node=0))
    assert "accelerators" not in task["resources"]
    assert "--nproc-per-node 1 " in task["run"]


@pytest.mark.parametrize(
    "right, wrong",
    [("use_spot:", "use_spots:"), ("max_restarts_on_errors", "max_restarts"), ("H100:8", "H100")],
)
def test_the_schema_finds_what_is_wrong(right: str, wrong: str, request_job: BUILD) -> None:
    job = write_skypilot_job(request_job())
    assert right in job
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(job.replace(right, wrong)), TASK)


def test_awkward_words_stay_what_they_are(request_job: BUILD, tmp_path: Path) -> None:
    words = ("long", "--sample-prompts", "it's: # no comment", "two\nlines", "\u2028")
    task = read(request_job(run_name="a: b", words=words))
    assert task["name"] == "a-b"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.fixture
def start_node(machines: Any, free_port: int) -> Callable[..., Any]:
    """Starts one of two nodes on this machine, with the variables that SkyPilot sets there."""
    activate = machines.work / "home/venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()

    def start(task: dict[str, Any], rank: int, nodes: int = 2) -> subprocess.Popen[str]:
        script = task["run"].replace("cd /overnight\n", "").replace(":29500", f":{free_port}")
        process: subprocess.Popen[str] = machines.start(
            *("bash", "-c", script),
            HOME=str(machines.work / "home"),
            SKYPILOT_NODE_RANK=str(rank),
            SKYPILOT_NODE_IPS="\n".join(["127.0.0.1", "127.0.0.2"][:nodes]),
            SKYPILOT_NUM_NODES=str(nodes),
            SKYPILOT_NUM_GPUS_PER_NODE="1",
            SKYPILOT_TASK_ID="sky-1",
        )
        return process

    return start


def test_the_first_node_prepares_and_both_begin(
    machines: Any,
    request_job: BUILD,
    start_node: Callable[..., Any],
    ended: Any,
    free_port: int,
    parse_torchrun: Callable[[list[str]], Any],
) -> None:
    task = read(request_job(nodes=2, words=("short", "--seed", "5")))
    both = [start_node(task, rank) for rank in (1, 0)]
    assert [ended(process)[0] for process in both] == [0, 0]
    words = [told["words"] for told in machines.noted("told")]
    assert words == [["prepare", "notes"], *2 * [["train", "short", "--seed", "5"]]]
    nodes = sorted(map(parse_torchrun, machines.noted("torchrun")), key=lambda node: str(node.local_addr))
    for node, address, is_host in zip(nodes, ["127.0.0.1", "127.0.0.2"], ["1", "0"], strict=True):
        assert (node.nnodes, node.nproc_per_node, node.rdzv_backend) == ("2", "1", "c10d")
        assert (node.rdzv_endpoint, node.rdzv_id) == (f"127.0.0.1:{free_port}", "sky-1")
        assert (node.local_addr, node.rdzv_conf) == (address, f"is_host={is_host}")


def test_a_recovered_task_goes_on(
    machines: Any, request_job: BUILD, start_node: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    (machines.work / "runs/mine").mkdir(parents=True)
    (machines.work / "runs/mine/recipe.toml").touch()
    assert ended(start_node(read(request_job()), 0, nodes=1))[0] == 0
    assert [told["words"] for told in machines.noted("told")] == [["train", "--resume", "runs/mine"]]


def test_a_run_that_was_told_to_stop_is_no_success(
    machines: Any, request_job: BUILD, start_node: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    process = start_node(read(request_job()), 0, nodes=1)
    machines.wait_for("told", 1, process)
    process.terminate()
    assert ended(process)[0] > 0
    assert machines.noted("saved") == [0]


def test_text_that_only_this_machine_has_is_not_prepared_there(
    machines: Any, request_job: BUILD, start_node: Callable[..., Any], ended: Any
) -> None:
    status, said = ended(start_node(read(request_job(texts=(JobText("data/notes"),))), 0, nodes=1))
    assert (status, said) == (2, "data/notes is not prepared\n")


def test_two_nodes_meet(
    machines: Any, request_job: BUILD, start_node: Callable[..., Any], ended: Any, text_is_there: None
) -> None:
    """By torchrun's own rendezvous."""
    machines.use_real_torchrun()
    task = read(request_job(nodes=2, gpus_per_node=1, words=("short",)))
    for status, said in [ended(process) for process in [start_node(task, rank) for rank in (0, 1)]]:
        assert status == 0, said
    places = sorted((told["RANK"], told["WORLD_SIZE"]) for told in machines.noted("told"))
    assert places == [("0", "2"), ("1", "2")]


def test_it_is_submitted_by_sky(request_job: BUILD) -> None:
    assert skypilot_submit_command(request_job(path="a.yaml")) == "sky jobs launch a.yaml"
