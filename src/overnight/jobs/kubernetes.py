"""A run as a PyTorchJob of Kubeflow's training operator (v1), with its volume."""

from __future__ import annotations

import re

from overnight.jobs.request import (
    SAVE_SECONDS,
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
CLAIM = "overnight"


def write_kubernetes_job(request: JobRequest) -> str:
    """The YAML for `kubectl apply`: a claim of the volume, unless there is one, and the job."""
    parts = [_head(request), _job(request), _pod(request)]
    if request.shared_disk is None:
        parts.insert(1, VOLUME)
    return "\n".join(parts)


def kubernetes_submit_command(request: JobRequest) -> str:
    """What hands the file to Kubernetes."""
    return join(("kubectl", "apply", "-f", request.path))


def _head(request: JobRequest) -> str:
    return f"""\
# {request.run} as a PyTorchJob of Kubeflow's training operator: {request.size}.
# Written by: {request.made_by}
#
# The image has overnight installed: FROM pytorch/pytorch, COPY a checkout, RUN pip install it. A pod that is
# taken away or fails is started again, and the run goes on from its last checkpoint.
"""


VOLUME = f"""\
# Holds runs/ and data/; applied again, it stays as it is.
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {CLAIM}
spec:
  # All pods write into one checkpoint: take a storage class that allows it (NFS, EFS, Filestore, CephFS).
  accessModes: [ReadWriteMany]
  # storageClassName: ...
  resources:
    requests:
      storage: 500Gi
---\
"""


def _job(request: JobRequest) -> str:
    return f"""\
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {request.name}
spec:
  nprocPerNode: "{request.processes_per_node}"
  runPolicy:
    cleanPodPolicy: None
    # The job is given up after so many restarts of its containers.
    backoffLimit: {10 * request.nodes}
  # The operator tells torchrun all this in PET_ variables. The first worker is where the others meet, and
  # one that comes back joins them again.
  elasticPolicy:
    rdzvBackend: c10d
    minReplicas: {request.nodes}
    maxReplicas: {request.nodes}
    maxRestarts: {request.max_restarts}
    rdzvConf:
      # So many seconds a pod waits for the first one to come up.
      - key: read_timeout
        value: "600"
  pytorchReplicaSpecs:
    Worker:
      replicas: {request.nodes}
      restartPolicy: OnFailure
      template:
        spec:
          # Between SIGTERM and the end: time for saving.
          terminationGracePeriodSeconds: {SAVE_SECONDS + 30}\
"""


def _pod(request: JobRequest) -> str:
    script = f"""\
set -e
{prepare_texts(request, "[[ $HOSTNAME == *-worker-0 ]]")}
{define_train(request)}
{define_is_finished(quote(request.run))}
torchrun --no-python bash -c train &
{WAIT_FOR_IT}\
exit "$status"
"""
    gpus = f"""\
              resources:
                limits:
                  nvidia.com/gpu: "{request.gpus_per_node}"
"""
    return f"""\
          containers:
            - name: pytorch
              image: {yaml_text(request.image or "YOUR-IMAGE")}
              workingDir: {PLACE}
              command: [bash, -c]
              args:
                - |
{block(_spare_dollars(script), 18)}
              env:
                - name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT
                  value: "{SAVE_SECONDS}"
                # Processes that torchrun begins anew meet anew (pytorch's issue 135712).
                - name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE
                  value: "1"
{gpus if request.gpus_per_node else ""}\
              volumeMounts:
                - name: overnight
                  mountPath: {PLACE}
                - name: shared-memory
                  mountPath: /dev/shm
          volumes:
            - name: overnight
              persistentVolumeClaim:
                claimName: {yaml_text(request.shared_disk or CLAIM)}
            # NCCL wants more of it than the 64 MB that a container has.
            - name: shared-memory
              emptyDir:
                medium: Memory
"""


def _spare_dollars(script: str) -> str:
    """In a container's arguments Kubernetes reads $(NAME), and $$ as one $: double what begins either."""
    return re.sub(r"\$(?=[$(])", "$$", script)
