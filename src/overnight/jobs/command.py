"""The command `overnight launch`: a job file for a cluster, that begins a run or goes on with it."""

from __future__ import annotations

import dataclasses
import math
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from overnight.config import field_types, raise_problems
from overnight.jobs import kubernetes, sagemaker, skypilot, slurm
from overnight.jobs.request import JobRequest, join
from overnight.preparation.prepare_commands import find_recipe_texts, with_folders
from overnight.recipe import Recipe, as_option, changed_options, load_recipe, recipe_names
from overnight.run_directory import write_atomically
from overnight.terminal import echo
from overnight.training.batch import plan_batches

TARGETS: dict[str, tuple[ModuleType, str]] = {
    "slurm": (slurm, "sbatch"),
    "skypilot": (skypilot, "skypilot.yaml"),
    "sagemaker": (sagemaker, "sagemaker.yaml"),
    "kubernetes": (kubernetes, "kubernetes.yaml"),
}
FOR_TARGETS = {
    "hours": ("slurm", "sagemaker"),
    "gpu": ("slurm", "skypilot", "sagemaker"),
    "partition": ("slurm",),
    "image": ("sagemaker", "kubernetes"),
    "bucket": ("skypilot", "sagemaker"),
    "role": ("sagemaker",),
    "shared_disk": ("skypilot", "sagemaker", "kubernetes"),
}
SEE_FILES = frozenset({"slurm", "sagemaker"})  # there the text comes from this machine's disk
RESTARTS = 3  # of all processes after one has died, where the recipe says nothing
TORCHRUNS = frozenset({"processes", "max_restarts"})  # settings that are torchrun's in a job file
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


def run(config: LaunchConfig, name: str) -> None:
    """Write the job file of the recipe `name`, changed as `config` has it.

    Raises ValueError if the run can't be divided among so many processes, or the file is already there.
    """
    target = config.target
    raise_problems(config.problems(), f"recipe {config.run_name}")
    check_division(config)
    writer, ending = TARGETS[target]
    path = Path(config.out or f"{config.run_name}.{ending}")
    if path.exists():
        raise ValueError(f"{path} is already there: move it, or give another --out")
    request = build_request(config, name, path)
    job = writer.write_job(request)
    write_atomically(path, job)
    echo(f"wrote {path}: {request.run} on {request.size}")
    if blanks := sorted({*re.findall(r"YOUR-[A-Z-]*[A-Z]", job)}):
        echo(f"fill in {', '.join(blanks)} there")
    preparations = find_missing(request) if target in SEE_FILES else []
    echo(f"next: {' && '.join([*preparations, writer.submit_command(request)])}")


def check_division(config: LaunchConfig) -> None:
    """Raise ValueError, with values that would do, unless the steps divide among all processes."""
    context, batch = config.model.context_length, config.batch
    plan = plan_batches(batch, context, 1)
    processes = config.nodes * max(1, config.gpus_per_node)
    micro_batches = plan.micro_batches(0)
    if micro_batches % processes == 0:
        return
    unit = plan.rows_per_micro_batch * context
    ramped = batch.ramp_from_tokens_per_step is not None
    setting = "ramp_from_tokens_per_step" if ramped else "tokens_per_step"
    nearest = max(1, round(micro_batches / processes)) * processes * unit
    fewer = max(count for count in range(1, processes) if micro_batches % count == 0)
    rows = f"{plan.rows_per_micro_batch} row{'s' if plan.rows_per_micro_batch > 1 else ''}"
    raise ValueError(
        f"{setting}={micro_batches * unit} is {micro_batches} micro-batches of {rows}, which {processes} "
        f"processes can't share equally: {fewer} can, or give {setting}={nearest}"
    )


def build_request(config: LaunchConfig, name: str, path: Path) -> JobRequest:
    """What the job file is written from. Only Slurm's nodes see the disk of this machine."""
    target, recipe = config.target, launch_recipe(config)
    texts = find_recipe_texts(config.data, name, with_files=target in SEE_FILES)
    asked = [*own_options(config), *changed_options(recipe, load_recipe(name))]
    left_out = TORCHRUNS | ({"data", "sources"} if target == "sagemaker" else frozenset())
    known = name
    if target == "slurm" and config.data.shuffle_tokens:
        texts = ()  # a run that need not wait for its text
    if target != "slurm":
        recipe = with_folders(recipe, texts)
        known = name if name in recipe_names() else nearest_recipe(recipe)
    return JobRequest(
        path=str(path),
        made_by=join(("overnight", "launch", name, *asked)),
        run_name=config.run_name,
        words=(known, *changed_options(recipe, load_recipe(known), left_out)),
        texts=texts,
        nodes=config.nodes,
        gpus_per_node=config.gpus_per_node,
        max_restarts=config.compute.max_restarts or RESTARTS,
        programs=sysconfig.get_path("scripts") if target == "slurm" else None,
        **{setting: getattr(config, setting) for setting in FOR_TARGETS},
    )


def launch_recipe(config: LaunchConfig) -> Recipe:
    """The recipe that is to run."""
    return Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})


def own_options(config: LaunchConfig) -> list[str]:
    """The words that ask for this job file, besides the recipe's."""
    kinds, default = field_types(LaunchConfig), LaunchConfig()
    own = [name for name in kinds if name not in field_types(Recipe)]
    given = [name for name in own if getattr(config, name) != getattr(default, name)]
    return [word for name in given for word in as_option(name, getattr(config, name), kinds[name])]


def nearest_recipe(recipe: Recipe) -> str:
    """The recipe of the package that becomes `recipe` by the fewest options: a machine elsewhere has it."""
    return min(recipe_names(), key=lambda name: len(changed_options(recipe, load_recipe(name))))


def find_missing(request: JobRequest) -> list[str]:
    """The commands that prepare what is not there yet."""
    missing = [text for text in request.texts if not (Path(text.folder) / "manifest.json").is_file()]
    return [join(text.prepare) for text in missing if text.prepare]
