{% import "common.sh" as shell %}
#!/bin/bash
# {{ job.run }} as a Slurm job: {{ job.size }}.
# Written by: {{ job.made_by }}
#
# Submit it in the folder that holds runs/ and data/, on a disk that all nodes see. Shortly before the time
# limit the run is saved and the job is queued again, until the run is finished.

#SBATCH --job-name={{ job.name }}
#SBATCH --output={{ job.name }}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={{ job.config.nodes }}
# One torchrun on each node, which starts its processes.
#SBATCH --ntasks-per-node=1
{% if job.config.gpus_per_node %}
#SBATCH --gpus-per-node={{ job.config.gpu ~ ":" if job.config.gpu else "" }}{{ job.config.gpus_per_node }}
# Lower this if a node has fewer cores.
#SBATCH --cpus-per-gpu=8
{% else %}
#SBATCH --exclusive
{% endif %}
#SBATCH --time={{ time_limit }}
# USR1 is sent {{ warning_seconds }} seconds before the limit, to this script only; see the end.
#SBATCH --signal=B:USR1@{{ warning_seconds }}
# Also after a node failure or a preemption.
#SBATCH --requeue
{{ "#" if job.config.partition else "##" }}SBATCH --partition={{ job.config.partition or "gpu" }}
##SBATCH --account=YOURS, IF YOUR CLUSTER WANTS ONE

{% if job.programs %}
# Where overnight is installed.
export PATH={{ job.programs | quote }}:"$PATH"
{% endif %}
# Seconds a process has to save before torchrun kills it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{ save_seconds }}
# Restarted processes need a new rendezvous store (pytorch's issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
{% for text in job.local_texts %}
{{ shell.require_text(text) -}}
{% endfor %}

{{ shell.define_train(job) }}
{{ shell.define_is_finished(job.run | quote) }}
# The nodes meet at the first one, on a port that differs between jobs on the same node.
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$FIRST_NODE:$((20000 + SLURM_JOB_ID % 20000))"

# The warning is passed on to the job's steps, where it reaches each torchrun. (Not to srun, which would kill
# them at once.) They save, and end with a SignalException in the log. When the job is cancelled Slurm signals
# them itself, and this script only waits.
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM

# exec: torchrun itself is the task that Slurm signals. --wait: others may save after the first has ended.
srun --kill-on-bad-exit=0 --wait={{ 2 * save_seconds }} --cpu-bind=none bash -c '
  exec torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node {{ job.processes_per_node }} --max-restarts {{ job.max_restarts }} \
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
