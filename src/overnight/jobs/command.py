"""The command `overnight launch`: writes a job file that starts a run on a cluster, or resumes it."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

from overnight.config import field_types, raise_problems
from overnight.files import write_atomically
from overnight.jobs import LaunchConfig
from overnight.jobs.targets import JobRequest, job_file, submit_command
from overnight.options import as_option
from overnight.preparation.prepare_commands import find_recipe_texts, with_folders
from overnight.recipe import Recipe, changed_options, load_recipe, plain_recipe, recipe_names
from overnight.terminal import echo, join_words
from overnight.training.batch import plan_batches

SEE_FILES = frozenset({"slurm", "sagemaker"})  # targets that use text from this machine's disk
TORCHRUN_SETTINGS = frozenset({"processes", "max_restarts"})  # a job file passes these to torchrun


def run(config: LaunchConfig, name: str) -> None:
    """Write the job file of the recipe `name` with the options in `config`.

    Raises ValueError if the batch cannot be divided among the processes, or the file exists.
    """
    target = config.target
    raise_problems(config.problems(), f"recipe {config.run_name}")
    check_division(config)
    path = Path(config.out or f"{config.run_name}.{'sbatch' if target == 'slurm' else f'{target}.yaml'}")
    if path.exists():
        raise ValueError(f"{path} already exists: move it, or give another --out")
    request = build_request(config, name, path)
    job = job_file(target, request)
    write_atomically(path, job)
    echo(f"wrote {path}: {request.run} on {request.size}")
    if blanks := sorted({*re.findall(r"YOUR-[A-Z-]*[A-Z]", job)}):
        echo(f"fill in {', '.join(blanks)} there")
    missing = [text for text in request.texts if not (Path(text.folder) / "manifest.json").is_file()]
    commands = [join_words(text.prepare) for text in missing if text.prepare and target in SEE_FILES]
    echo(f"next: {' && '.join([*commands, submit_command(target, request)])}")


def check_division(config: LaunchConfig) -> None:
    """Raise ValueError, with working values, unless each step divides among all processes."""
    context, batch = config.model.context_length, config.batch
    plan = plan_batches(batch, context, 1)
    processes = config.nodes * max(1, config.gpus_per_node)
    micro_batches = plan.micro_batches(0)
    if micro_batches % processes == 0:
        return
    micro_batch_tokens = plan.micro_batch_size * context
    setting = "tokens_per_step" if batch.batch_ramp_start_tokens is None else "batch_ramp_start_tokens"
    nearest = max(1, round(micro_batches / processes)) * processes * micro_batch_tokens
    fewer = max(count for count in range(1, processes) if micro_batches % count == 0)
    rows = f"{plan.micro_batch_size} row{'s' if plan.micro_batch_size > 1 else ''}"
    raise ValueError(
        f"{setting}={micro_batches * micro_batch_tokens} is {micro_batches} micro-batches of {rows}, which "
        f"do not divide among {processes} processes: use {fewer} processes, or {setting}={nearest}"
    )


def build_request(config: LaunchConfig, name: str, path: Path) -> JobRequest:
    """The values of the job file. Only Slurm's nodes share the disk of this machine."""
    target, recipe = config.target, plain_recipe(config)
    texts = find_recipe_texts(config.data, name, with_files=target in SEE_FILES)
    options = [*launch_options(config), *changed_options(recipe, load_recipe(name))]
    left_out = TORCHRUN_SETTINGS | ({"data", "mixture"} if target == "sagemaker" else frozenset())
    known_recipe = name
    if target == "slurm" and config.data.shuffle_window:
        texts = ()  # such a run starts before its text is complete
    if target != "slurm":
        recipe = with_folders(recipe, texts)
        if name not in recipe_names():  # a file of this machine: use the nearest recipe of the package
            known_recipe = min(
                recipe_names(), key=lambda known: len(changed_options(recipe, load_recipe(known)))
            )
    return JobRequest(
        config=config,
        path=str(path),
        made_by=join_words(("overnight", "launch", name, *options)),
        words=(known_recipe, *changed_options(recipe, load_recipe(known_recipe), left_out)),
        texts=texts,
        programs=sysconfig.get_path("scripts") if target == "slurm" else None,
    )


def launch_options(config: LaunchConfig) -> list[str]:
    """The options of `launch` that are not the recipe's, as words of a command line."""
    kinds, default = field_types(LaunchConfig), LaunchConfig()
    own = [name for name in kinds if name not in field_types(Recipe)]
    given = [name for name in own if getattr(config, name) != getattr(default, name)]
    return [word for name in given for word in as_option(name, getattr(config, name), kinds[name])]
