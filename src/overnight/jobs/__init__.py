"""Job files for Slurm, SkyPilot, SageMaker and Kubernetes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from overnight.recipe import Recipe

TARGETS = ("slurm", "skypilot", "sagemaker", "kubernetes")
TARGETS_OF_SETTING = {
    "hours": ("slurm", "sagemaker"),
    "gpu": ("slurm", "skypilot", "sagemaker"),
    "partition": ("slurm",),
    "image": ("sagemaker", "kubernetes"),
    "bucket": ("skypilot", "sagemaker"),
    "role": ("sagemaker",),
    "shared_disk": ("skypilot", "sagemaker", "kubernetes"),
}
SHORTEST_HOURS = 0.25  # saving starts minutes before the time limit


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Recipe):
    """A recipe with its options, and the cluster that runs it."""

    slurm: bool = False
    """Write a batch script for sbatch. It saves and requeues itself at the time limit."""
    skypilot: bool = False
    """Write a task for `sky jobs launch`: spot machines of any cloud, replaced after preemption."""
    sagemaker: bool = False
    """Write a request for `aws sagemaker create-training-job`, on spot machines as well."""
    kubernetes: bool = False
    """Write a PyTorchJob for Kubeflow's training operator, with its volume."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 8
    """GPUs of each machine, with one process each; 0 for machines without GPUs."""
    out: str | None = None
    """The file to write. Default: RUN_NAME.sbatch or RUN_NAME.TARGET.yaml."""
    hours: float = 24.0
    """The job's time limit, for Slurm and SageMaker."""
    gpu: str | None = None
    """GPU type: H100, A100-80GB, L4. Default: H100; any for Slurm."""
    partition: str | None = None
    """Slurm's partition."""
    image: str | None = None
    """The container image that has overnight installed, for SageMaker and Kubernetes."""
    bucket: str | None = None
    """The bucket that holds runs/ and data/ of one node, for SkyPilot and SageMaker."""
    role: str | None = None
    """The ARN of SageMaker's role."""
    shared_disk: str | None = None
    """The disk that holds runs/ of several nodes: HOST:/PATH of an NFS export for SkyPilot, the id of an FSx
    for Lustre for SageMaker, the name of a volume claim for Kubernetes, which creates one by default."""

    @property
    def target(self) -> str:
        """The chosen target. Raises ValueError unless exactly one is chosen."""
        chosen = [name for name in TARGETS if getattr(self, name)]
        options = [f"--{name}" for name in chosen or TARGETS]
        if not chosen:
            raise ValueError(f"overnight launch needs one of {', '.join(options)}")
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(options)} exclude each other: give only one")
        return chosen[0]

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = super().problems()
        for name, minimum in (("nodes", 1), ("gpus_per_node", 0), ("hours", SHORTEST_HOURS)):
            if not minimum <= (value := getattr(self, name)) < math.inf:
                found.append(f"{name}={value} must be at least {minimum}")
        if self.compute.processes is not None:
            found.append(
                f"processes={self.compute.processes} is for one machine: use --nodes and --gpus-per-node"
            )
        default = LaunchConfig()
        for name, targets in TARGETS_OF_SETTING.items():
            if getattr(self, name) != getattr(default, name) and self.target not in targets:
                options = " and ".join(f"--{target}" for target in targets)
                found.append(f"{name} is for {options}: leave it out")
        return found
