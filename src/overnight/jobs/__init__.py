"""Job files for Slurm, SkyPilot, SageMaker and Kubernetes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from overnight.recipe import Recipe

TARGETS = ("slurm", "skypilot", "sagemaker", "kubernetes")


FOR_TARGETS = {
    "hours": ("slurm", "sagemaker"),
    "gpu": ("slurm", "skypilot", "sagemaker"),
    "partition": ("slurm",),
    "image": ("sagemaker", "kubernetes"),
    "bucket": ("skypilot", "sagemaker"),
    "role": ("sagemaker",),
    "shared_disk": ("skypilot", "sagemaker", "kubernetes"),
}


SHORTEST_HOURS = 0.25  # a run is saved some minutes before its time is up


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Recipe):
    """A recipe, as `overnight train` takes it, and where it is to run."""

    slurm: bool = False
    """Write a batch script for sbatch. It saves and queues itself again when its time is up."""
    skypilot: bool = False
    """Write a task for `sky jobs launch`: spot machines of any cloud, found again when taken away."""
    sagemaker: bool = False
    """Write a request for `aws sagemaker create-training-job`, on spot machines as well."""
    kubernetes: bool = False
    """Write a PyTorchJob for Kubeflow's training operator, with its volume."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each, one process for each GPU; 0 for machines without."""
    out: str | None = None
    """The file to write; RUN_NAME.sbatch or RUN_NAME.TARGET.yaml if left out."""
    hours: float = 24.0
    """The job's time limit, for Slurm and SageMaker."""
    gpu: str | None = None
    """The GPU's kind: H100, A100-80GB, L4. H100 if left out; Slurm then takes any."""
    partition: str | None = None
    """Slurm's partition."""
    image: str | None = None
    """The container image that has overnight installed, for SageMaker and Kubernetes."""
    bucket: str | None = None
    """Where one node keeps runs/ and data/, for SkyPilot and SageMaker."""
    role: str | None = None
    """The ARN of SageMaker's role."""
    shared_disk: str | None = None
    """What several nodes keep runs/ on: HOST:/PATH of an NFS export for SkyPilot, an FSx for Lustre's id for
    SageMaker, the name of a volume's claim for Kubernetes, which makes one if left out."""

    @property
    def target(self) -> str:
        """The one that is asked for. Raises ValueError if none is, or several are."""
        asked = [name for name in TARGETS if getattr(self, name)]
        options = [f"--{name}" for name in asked or TARGETS]
        if not asked:
            raise ValueError(f"overnight launch needs one of {', '.join(options)}")
        if len(asked) > 1:
            raise ValueError(f"a job file is for one of {' and '.join(options)}: give only one")
        return asked[0]

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = super().problems()
        if self.nodes < 1:
            found.append(f"nodes={self.nodes} must be at least 1")
        if self.gpus_per_node < 0:
            found.append(f"gpus_per_node={self.gpus_per_node} must be at least 0")
        if not SHORTEST_HOURS <= self.hours < math.inf:
            found.append(f"hours={self.hours} must be at least {SHORTEST_HOURS}")
        if self.compute.processes is not None:
            found.append(
                f"processes={self.compute.processes} is for one machine: leave it out, and say --nodes and "
                "--gpus-per-node"
            )
        return found + self._misplaced()

    def _misplaced(self) -> list[str]:
        """Settings that have no meaning for the target."""
        default = LaunchConfig()
        return [
            f"{name} is for {' and '.join(f'--{target}' for target in targets)}: leave it out"
            for name, targets in FOR_TARGETS.items()
            if getattr(self, name) != getattr(default, name) and self.target not in targets
        ]
