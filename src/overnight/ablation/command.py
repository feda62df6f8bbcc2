"""The command `overnight ablate`: train the arms, compare them in pairs, print and write the results."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overnight.ablation import AblationConfig
from overnight.ablation.arms import Arm, build_arms, keep_schedule, read_seeds, tuning_seed
from overnight.ablation.campaign import ArmRun, Campaign, announce_run, read_result
from overnight.ablation.page import ablation_page, ablation_text
from overnight.ablation.record import AblationRecord, RunResult, summarize_arm, with_times
from overnight.ablation.timing import time_in_turn
from overnight.config import raise_problems
from overnight.data.dataset import open_dataset
from overnight.distributed.launcher import is_launched
from overnight.distributed.world import World, count_processes, open_world
from overnight.files import write_atomically
from overnight.preparation.prepare import ensure_prepared
from overnight.recipe import Recipe, Resolved, load_recipe, with_settings
from overnight.report.plots import check_matplotlib
from overnight.terminal import echo, shell_command
from overnight.training import ComputeConfig

DONE, FAILED = 0, 1


def run(config: AblationConfig, name: str, baseline: Recipe | None, words: Sequence[str]) -> int:
    """Train what is missing of the campaign and print its results; returns 1 if a run has failed.

    `words` are those of the command line, that continue a stopped campaign. Raises KeyboardInterrupt if
    it was stopped; the run is then saved.
    """
    check_matplotlib()  # before hours of training
    if is_launched():
        raise ValueError("`overnight ablate` starts its runs itself: start it without torchrun or srun")
    config = keep_schedule(config, load_recipe(name))
    if baseline is not None:
        baseline = keep_schedule(baseline, load_recipe(config.baseline or ""))
    arms, seeds = build_arms(config, name, baseline), read_seeds(config)
    dataset = open_dataset(ensure_prepared(config.data))
    world = world_of_runs(config.compute)
    campaign = Campaign(f"ablate-{config.run_name}", dataset, world)
    command = shell_command("ablate", *words)
    check_baseline(campaign, arms[0])
    tuning, compared = plan_runs(campaign, arms, seeds)
    campaign.check([*tuning, *compared])
    announce_campaign(campaign, arms, len(seeds), len(tuning))
    try:
        record, decided = run_campaign(campaign, arms, seeds, tuning)
        record = dataclasses.replace(record, command=command)
        record = measure_times(record, decided) if config.step_times else record
    except KeyboardInterrupt:
        echo(f"next: {command}")
        raise
    write_results(campaign, record, is_json=config.json)
    return FAILED if record.failures else DONE


def world_of_runs(compute: ComputeConfig) -> World:
    """The processes of each run, as far as settings depend on them; none is started here."""
    world = open_world(compute.device)
    if compute.processes is None:
        return world
    count = count_processes(compute.processes, compute.device)
    return dataclasses.replace(world, size=count, local_size=count)


def check_baseline(campaign: Campaign, baseline: Arm) -> None:
    """Raise ValueError if the folder holds the results of a comparison with another baseline."""
    path = campaign.folder / "ablate.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["arms"][0]["name"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # it is written again
    if before != baseline.name:
        raise ValueError(
            f"{campaign.folder} holds a comparison with {before}, not with {baseline.name}: give another "
            "--run-name"
        )


def announce_campaign(campaign: Campaign, arms: Sequence[Arm], seeds: int, tuned: int) -> None:
    """Print what will be trained."""
    steps = f"{len(arms)} arms x {seeds} {'seed' if seeds == 1 else 'seeds'}"
    more = f", and {tuned} to tune" if tuned else ""
    echo(f"{campaign.folder}: {steps} = {len(arms) * seeds} runs{more}")
    for arm in arms:
        about = (
            "the baseline"
            if arm is arms[0]
            else ", ".join(f"{name} {new}" for name, (_, new) in list(arm.changes_from(arms[0]).items())[:3])
        )
        echo(f"  {arm.name}: {about or 'the same recipe as the baseline'}"[:80])


def plan_runs(
    campaign: Campaign, arms: Sequence[Arm], seeds: Sequence[int]
) -> tuple[list[ArmRun], list[ArmRun]]:
    """The runs that tune, and the compared runs, those of tuned arms with some settings of the grid.

    Raises one ValueError with what each arm can't do here, before any training.
    """
    by_reason: dict[str, list[str]] = {}
    tuning: list[ArmRun] = []
    compared: list[ArmRun] = []
    for arm in arms:
        try:
            for settings in arm.grid:
                label = "".join(f"-{name}-{value}" for name, value in settings.items())
                tuning.append(campaign.plan_run(arm, tuning_seed(seeds), settings, label))
            compared += [plan_compared(campaign, arm, seed) for seed in seeds]
        except ValueError as error:
            by_reason.setdefault(str(error), []).append(arm.name)
    problems = [
        reason if len(names) == len(arms) or reason.startswith("recipe ") else f"{', '.join(names)}: {reason}"
        for reason, names in by_reason.items()
    ]
    raise_problems(problems, campaign.name)
    return tuning, compared


def plan_compared(campaign: Campaign, arm: Arm, seed: int) -> ArmRun:
    """A compared run. If the arm is tuned, the run on the disk as far as it has settings of the grid."""
    run = campaign.plan_run(arm, seed, arm.grid[0] if arm.grid else {})
    if not run.directory.exists():
        return run
    others = (campaign.plan_run(arm, seed, settings) for settings in arm.grid[1:])
    return next((each for each in (run, *others) if not campaign.problem_of(each)), run)


def run_campaign(
    campaign: Campaign, arms: Sequence[Arm], seeds: Sequence[int], tuning: Sequence[ArmRun]
) -> tuple[AblationRecord, list[Resolved]]:
    """Tune, train and read everything; the record, and how each arm was decided.

    A run that fails is recorded, and the others go on.
    """
    tried = choose_settings(train_all(campaign, tuning))
    chosen = {run.arm: run.settings for run in tried if run.is_chosen}
    tuned = [
        dataclasses.replace(arm, recipe=with_settings(arm.recipe, **chosen.get(arm.name, {}))) for arm in arms
    ]
    groups = [[campaign.plan_run(arm, seed, chosen.get(arm.name, {})) for seed in seeds] for arm in arms]
    campaign.check([run for group in groups for run in group])
    hopeless = {arm.name for arm in arms if arm.grid} - chosen.keys()
    in_order = [run for group in zip(*groups, strict=True) for run in group]  # seed after seed
    results = train_all(campaign, [run for run in in_order if run.arm not in hopeless])
    none_sound = "none of the runs that tune its arm has a final loss"
    results += [read_result(run, none_sound) for run in in_order if run.arm in hopeless]
    by_arm = {arm.name: [run for run in results if run.arm == arm.name] for arm in arms}
    decided = [group[0].resolved for group in groups]
    record = AblationRecord(
        name=campaign.name,
        command="",
        seeds=seeds,
        total_tokens=decided[0].plan.tokens_before(decided[0].total_steps),
        total_steps=decided[0].total_steps,
        tokens_per_step=decided[0].recipe.batch.tokens_per_step,
        data=str(campaign.dataset.folder),
        arms=[
            summarize_arm(
                arm.name,
                arm.changes_from(tuned[0]),
                resolved.model,
                by_arm[arm.name],
                None if arm is tuned[0] else by_arm[arms[0].name],
            )
            for arm, resolved in zip(tuned, decided, strict=True)
        ],
        tried=tried,
        notices=[*tuning_notices(arms, chosen)] if tried else (),
    )
    return record, decided


def train_all(campaign: Campaign, runs: Sequence[ArmRun]) -> list[RunResult]:
    """Train what is missing, one after another; the results in the same order."""
    results = []
    for number, each in enumerate(runs):
        announce_run(runs, number)
        results.append(read_result(each, campaign.train(each)))
        if results[-1].failure:
            echo(f"{each.directory.path}: {results[-1].failure}; the other runs go on")
    return results


def choose_settings(tried: Sequence[RunResult]) -> list[RunResult]:
    """The runs that tune, those with the lowest loss of their arm marked as chosen."""
    best: dict[str, RunResult] = {}
    for run in tried:
        if run.failure is None and (run.arm not in best or run.loss < best[run.arm].loss):
            best[run.arm] = run
    return [dataclasses.replace(run, is_chosen=best.get(run.arm) is run) for run in tried]


def tuning_notices(arms: Sequence[Arm], chosen: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Warnings about arms that were not tuned, and about values at the end of those tried."""
    for arm in arms:
        if not arm.grid:
            yield f"{arm.name} was not tuned: none of the tuned settings has a meaning for it."
        yield from _at_the_end(arm, chosen.get(arm.name, {}))


def _at_the_end(arm: Arm, best: Mapping[str, Any]) -> Iterator[str]:
    """A warning for each number that was best as the lowest or highest of those tried."""
    for name, value in best.items():
        values = sorted({each[name] for each in arm.grid}) if isinstance(value, int | float) else []
        if len(values) > 1 and value in {values[0], values[-1]}:
            end = "lowest" if value == values[0] else "highest"
            yield f"{arm.name}: the best {name}, {value:g}, is the {end} that was tried: try more beyond it."


def measure_times(record: AblationRecord, decided: Sequence[Resolved]) -> AblationRecord:
    """The record with the time of a step of each arm, timed in turn with the baseline's."""
    baseline, *others = record.arms
    arms, notices = [], [*record.notices]
    for arm, resolved in zip(others, decided[1:], strict=True):
        times = time_in_turn(decided[0], resolved)
        if times is None:
            notices.append(f"{arm.name}: its steps were not timed: two models need too much memory at once.")
            arms.append(arm)
        else:
            arms.append(with_times(arm, times, record.tokens_per_step))
            baseline = dataclasses.replace(baseline, step_seconds=times.baseline_seconds, step_time_ratio=1.0)
    return dataclasses.replace(record, arms=[baseline, *arms], notices=notices)


def write_results(campaign: Campaign, record: AblationRecord, *, is_json: bool) -> None:
    """Print the results; write ablate.json and ablate.html into the campaign's folder."""
    found = json.dumps(record.to_json(), indent=2) + "\n"
    text = ablation_text(record)
    if is_json:
        sys.stdout.write(found)
        echo(text)
    else:
        sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    write_atomically(campaign.folder / "ablate.json", found)
    page = campaign.folder / "ablate.html"
    write_atomically(page, ablation_page(record))
    echo(f"wrote {page}, with plots; open it in a browser")
    if finished := [arm.runs[0].path for arm in record.arms if arm.runs[0].failure is None]:
        echo(f"next: {shell_command('report', *finished)}")
