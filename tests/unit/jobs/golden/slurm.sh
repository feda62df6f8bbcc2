#!/bin/bash
# runs/mine as a Slurm job: 2 nodes with 4 GPUs each.
# Written by: overnight launch long
#
# Submit it in the folder that holds runs/ and data/, on a disk that all nodes see. Shortly before the time
# limit the run is saved and the job is queued again, until the run is finished.

#SBATCH --job-name=mine
#SBATCH --output=mine-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
# One torchrun on each node, which starts its processes.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:4
# Lower this if a node has fewer cores.
#SBATCH --cpus-per-gpu=8
#SBATCH --time=1-06:30:00
# USR1 is sent 180 seconds before the limit, to this script only; see the end.
#SBATCH --signal=B:USR1@180
# Also after a node failure or a preemption.
#SBATCH --requeue
#SBATCH --partition=gpu
##SBATCH --account=YOURS, IF YOUR CLUSTER WANTS ONE

# Seconds a process has to save before torchrun kills it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
# Restarted processes need a new rendezvous store (pytorch's issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ ! -f data/notes/manifest.json ]; then
  echo 'data/notes is not prepared: overnight prepare notes' >&2
  exit 2
fi

# Every process starts the run, or resumes it if it has been started: also after a restart.
train() {
  if [ -f runs/mine/recipe.toml ]; then
    exec overnight train --resume runs/mine
  else
    exec overnight train long
  fi
}
export -f train

is_finished() { overnight runs runs/mine --json | grep -q '"state": "finished"'; }

# The nodes meet at the first one, on a port that differs between jobs on the same node.
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$FIRST_NODE:$((20000 + SLURM_JOB_ID % 20000))"

# The warning is passed on to the job's steps, where it reaches each torchrun. (Not to srun, which would kill
# them at once.) They save, and end with a SignalException in the log. When the job is cancelled Slurm signals
# them itself, and this script only waits.
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM

# exec: torchrun itself is the task that Slurm signals. --wait: others may save after the first has ended.
srun --kill-on-bad-exit=0 --wait=300 --cpu-bind=none bash -c '
  exec torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
    --no-python bash -c train' &
running=$!

while kill -0 "$running" 2>/dev/null; do wait "$running"; done # a signal ends `wait`, not the job
wait "$running"
status=$?
if [ -n "${warned:-}" ] && ! is_finished; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
