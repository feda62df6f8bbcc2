"""A run as a task for SkyPilot: spot machines of any cloud, found again when they are taken away."""

from __future__ import annotations

from overnight.jobs.request import (
    WAIT_FOR_IT,
    JobRequest,
    block,
    define_is_finished,
    define_train,
    join,
    prepare_texts,
    quote,
    yaml_text,
)

PLACE = "/overnight"


def write_skypilot_job(request: JobRequest) -> str:
    """The YAML of a task for `sky jobs launch`."""
    return "\n".join([_head(request), _resources(request), _storage(request), _setup(request), _run(request)])


def skypilot_submit_command(request: JobRequest) -> str:
    """What hands the file to SkyPilot."""
    return join(("sky", "jobs", "launch", request.path))


def _head(request: JobRequest) -> str:
    return f"""\
# {request.run} as a SkyPilot task: {request.size}, on spot machines.
# Written by: {request.made_by}
#
# Launch it in a checkout of overnight, which is copied to every node. When a machine is taken away SkyPilot
# finds another, and the run goes on from its last checkpoint.

name: {request.name}

workdir: .

num_nodes: {request.nodes}
"""


def _resources(request: JobRequest) -> str:
    gpus = yaml_text(f"{request.gpu or 'H100'}:{request.gpus_per_node}")
    place = "  # infra: aws/us-east-1, or wherever the shared disk is\n" if request.nodes > 1 else ""
    return f"""\
resources:
  {f"accelerators: {gpus}" if request.gpus_per_node else "cpus: 16+"}
{place}\
  use_spot: true
  disk_size: 512
  job_recovery:
    # A machine that is taken away is replaced, in another region if need be, as often as it happens.
    strategy: EAGER_NEXT_REGION
    # An error of the program itself ends the job after so many more tries.
    max_restarts_on_errors: {request.max_restarts}
"""


def _storage(request: JobRequest) -> str:
    """One node writes into a bucket; several need a disk on which each sees what the others write."""
    if request.nodes == 1:
        bucket = request.bucket or "YOUR-BUCKET"
        key = "source" if "://" in bucket else "name"
        return f"""\
# {PLACE} holds runs/ and data/, and outlives the machines.
file_mounts:
  {PLACE}:
    # Made if it is not there. MOUNT_CACHED, for MOUNT can't append to a file.
    {key}: {yaml_text(bucket)}
    mode: MOUNT_CACHED
"""
    return f"""\
# {PLACE} holds runs/ and data/, and outlives the machines. Several nodes write into one checkpoint,
# so it is a disk that all of them see: an NFS export, as EFS and Filestore have. A bucket shows files late.
envs:
  SHARED_DISK: {yaml_text(request.shared_disk or "YOUR-HOST:/PATH")}
"""


def _setup(request: JobRequest) -> str:
    script = "pip install uv\nuv venv --python 3.12 ~/venv\n"
    script += "uv pip install --python ~/venv -c constraints.txt .\n"
    if request.nodes > 1:
        script += (
            "command -v mount.nfs || { sudo apt-get update && sudo apt-get install -y nfs-common; }\n"
            f'sudo mkdir -p {PLACE}; mountpoint -q {PLACE} || sudo mount -t nfs4 "$SHARED_DISK" {PLACE}\n'
            f'sudo chown "$USER" {PLACE}\n'
        )
    return f"setup: |\n  set -e\n{block(script, 2)}\n"


def _run(request: JobRequest) -> str:
    processes = '"$SKYPILOT_NUM_GPUS_PER_NODE"' if request.gpus_per_node else "1"
    script = f"""\
set -e
source ~/venv/bin/activate
cd {PLACE}

{prepare_texts(request, '[ "$SKYPILOT_NODE_RANK" = 0 ]')}
{define_train(request)}
{define_is_finished(quote(request.run))}
# SKYPILOT_NODE_IPS has one address a line, the first node's first.
first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
here=$(echo "$SKYPILOT_NODE_IPS" | sed -n "$((SKYPILOT_NODE_RANK + 1))p")
# Processes that torchrun begins anew meet anew (pytorch's issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun \\
  --nnodes "$SKYPILOT_NUM_NODES" --nproc-per-node {processes} --max-restarts {request.max_restarts} \\
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SKYPILOT_TASK_ID" \\
  --rdzv-conf "is_host=$((SKYPILOT_NODE_RANK == 0))" --local-addr "$here" \\
  --no-python bash -c train &
{WAIT_FOR_IT}\
exit "$status"
"""
    return f"run: |\n{block(script, 2)}\n"
