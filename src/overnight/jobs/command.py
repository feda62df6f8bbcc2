"""The command `overnight launch`: a job file for a cluster, that begins a run or goes on with it."""

from __future__ import annotations

import dataclasses
import re
import sysconfig
from pathlib import Path

from overnight.config import field_types, raise_problems
from overnight.jobs import FOR_TARGETS, LaunchConfig, kubernetes, sagemaker, skypilot, slurm
from overnight.jobs.request import JobRequest, join
from overnight.preparation.prepare_commands import find_recipe_texts, with_folders
from overnight.recipe import Recipe, load_recipe, recipe_names
from overnight.recipe_options import as_option, changed_options
from overnight.run_directory import write_atomically
from overnight.terminal import echo
from overnight.training.batch import plan_batches

WRITERS = {
    "slurm": (slurm.write_slurm_job, slurm.slurm_submit_command, "sbatch"),
    "skypilot": (skypilot.write_skypilot_job, skypilot.skypilot_submit_command, "skypilot.yaml"),
    "sagemaker": (sagemaker.write_sagemaker_job, sagemaker.sagemaker_submit_command, "sagemaker.yaml"),
    "kubernetes": (kubernetes.write_kubernetes_job, kubernetes.kubernetes_submit_command, "kubernetes.yaml"),
}
SEE_FILES = frozenset({"slurm", "sagemaker"})  # there the text comes from this machine's disk
RESTARTS = 3  # of all processes after one has died, where the recipe says nothing
TORCHRUNS = frozenset({"processes", "max_restarts"})  # settings that are torchrun's in a job file


def run(config: LaunchConfig, name: str) -> None:
    """Write the job file of the recipe `name`, changed as `config` has it.

    Raises ValueError if the run can't be divided among so many processes, or the file is already there.
    """
    target = config.target
    raise_problems(config.problems(), f"recipe {config.run_name}")
    check_division(config)
    write_job, submit_command, ending = WRITERS[target]
    path = Path(config.out or f"{config.run_name}.{ending}")
    if path.exists():
        raise ValueError(f"{path} is already there: move it, or give another --out")
    request = build_request(config, name, path)
    job = write_job(request)
    write_atomically(path, job)
    echo(f"wrote {path}: {request.run} on {request.size}")
    if blanks := sorted({*re.findall(r"YOUR-[A-Z-]*[A-Z]", job)}):
        echo(f"fill in {', '.join(blanks)} there")
    preparations = find_missing(request) if target in SEE_FILES else []
    echo(f"next: {' && '.join([*preparations, submit_command(request)])}")


def check_division(config: LaunchConfig) -> None:
    """Raise ValueError, with values that would do, unless the steps divide among all processes."""
    context, batch = config.model.context_length, config.batch
    plan = plan_batches(batch, context, 1)
    processes = config.nodes * max(1, config.gpus_per_node)
    micro_batches = plan.micro_batches(0)
    if micro_batches % processes == 0:
        return
    unit = plan.micro_batch_size * context
    ramped = batch.batch_ramp_start_tokens is not None
    setting = "batch_ramp_start_tokens" if ramped else "tokens_per_step"
    nearest = max(1, round(micro_batches / processes)) * processes * unit
    fewer = max(count for count in range(1, processes) if micro_batches % count == 0)
    rows = f"{plan.micro_batch_size} row{'s' if plan.micro_batch_size > 1 else ''}"
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
    if target == "slurm" and config.data.shuffle_window:
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
