"""A run as a batch script for Slurm."""

from __future__ import annotations

from overnight.jobs.request import (
    SAVE_SECONDS,
    JobRequest,
    define_is_finished,
    define_train,
    join,
    quote,
    refuse_without,
)

WARNING_SECONDS = SAVE_SECONDS + 30


def write_slurm_job(request: JobRequest) -> str:
    """The script for `sbatch`. It queues itself again when its time is up, until the run is done."""
    is_finished = define_is_finished(quote(request.run))
    parts = [_head(request), _body(request), define_train(request), is_finished, _start(request), WAIT]
    return "\n".join(parts)


def slurm_submit_command(request: JobRequest) -> str:
    """What hands the file to Slurm."""
    return join(("sbatch", request.path))


def _head(request: JobRequest) -> str:
    kind = f"{request.gpu}:" if request.gpu else ""
    gpus = [
        f"#SBATCH --gpus-per-node={kind}{request.gpus_per_node}",
        "# Lower it where a node has fewer cores.",
        "#SBATCH --cpus-per-gpu=8",
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {request.run} as a Slurm job: {request.size}.",
            f"# Written by: {request.made_by}",
            "#",
            "# Submit it in the folder of runs/ and data/, on a disk that all nodes see. Shortly before its",
            "# time is up the run is saved and the job queued again, until the run is done.",
            "",
            f"#SBATCH --job-name={request.name}",
            f"#SBATCH --output={request.name}-%j.log",
            "#SBATCH --open-mode=append",
            f"#SBATCH --nodes={request.nodes}",
            "# One torchrun on each node, which starts its processes.",
            "#SBATCH --ntasks-per-node=1",
            *(gpus if request.gpus_per_node else ["#SBATCH --exclusive"]),
            f"#SBATCH --time={_time(request.hours)}",
            f"# USR1 comes {WARNING_SECONDS} seconds before that, to this script alone; see the end.",
            f"#SBATCH --signal=B:USR1@{WARNING_SECONDS}",
            "# Also when a node fails, or a more urgent job takes it.",
            "#SBATCH --requeue",
            f"{'#' if request.partition else '##'}SBATCH --partition={request.partition or 'gpu'}",
            "##SBATCH --account=YOURS, IF YOUR CLUSTER WANTS ONE",
            "",
        ]
    )


def _time(hours: float) -> str:
    """As Slurm writes it: days-hours:minutes:seconds."""
    minutes = round(hours * 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def _body(request: JobRequest) -> str:
    programs = request.programs and [
        "# Where overnight is installed.",
        f'export PATH={quote(request.programs)}:"$PATH"',
    ]
    texts = [refuse_without(text) for text in request.texts if not text.is_remote]
    return "\n".join(
        [
            *(programs or []),
            "# So many seconds a process has for saving, before torchrun kills it.",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SAVE_SECONDS}",
            "# Processes that torchrun begins anew meet anew (pytorch's issue 135712).",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            *texts,
            "",
        ]
    )


def _start(request: JobRequest) -> str:
    processes, restarts = request.processes_per_node, request.max_restarts
    return f"""\
# The nodes find one another at the first one, at a port that jobs on the same node do not share.
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$FIRST_NODE:$((20000 + SLURM_JOB_ID % 20000))"

# The warning is passed on to the steps of the job, where it reaches each torchrun. (Not to srun: it would
# kill them at once.) They save, and end with a SignalException in the log. When the job is cancelled Slurm
# tells them itself, and this script has only to wait.
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM

# exec: torchrun itself is the task that Slurm signals. --wait: it may save a while after the first is done.
srun --kill-on-bad-exit=0 --wait={2 * SAVE_SECONDS} --cpu-bind=none bash -c '
  exec torchrun \\
    --nnodes "$SLURM_NNODES" --nproc-per-node {processes} --max-restarts {restarts} \\
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$SLURM_JOB_ID" \\
    --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \\
    --no-python bash -c train' &
running=$!
"""


WAIT = """\
while kill -0 "$running" 2>/dev/null; do wait "$running"; done # a signal ends a wait, not the job
wait "$running"
status=$?
if [ -n "${warned:-}" ] && ! is_finished; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
