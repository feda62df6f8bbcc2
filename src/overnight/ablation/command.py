"""The command `overnight ablate`: train the arms, compare them in pairs, print and write the results."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overnight.ablation import AblationConfig
from overnight.ablation.arms import Arm, build_arms, read_seeds, tuning_seed
from overnight.ablation.campaign import ArmRun, Campaign, FinalLoss, announce, read_final
from overnight.ablation.page import ablation_page, ablation_text
from overnight.ablation.results import (
    AblationRecord,
    ArmResult,
    TriedSettings,
    ablation_to_json,
    summarize_arm,
    with_times,
)
from overnight.ablation.timing import time_in_turn
from overnight.data.dataset import open_dataset
from overnight.distributed.launcher import is_launched
from overnight.distributed.world import World, count_processes, open_world
from overnight.files import write_atomically
from overnight.preparation.prepare import ensure_prepared
from overnight.recipe import Recipe, with_settings
from overnight.report.plots import check_matplotlib
from overnight.terminal import echo, shell_command
from overnight.training import ComputeConfig

DONE, FAILED = 0, 1


def run(config: AblationConfig, name: str, baseline: Recipe | None, words: Sequence[str]) -> int:
    """Train what is missing of the campaign and print its results; returns 1 if a run has failed.

    `words` are those of the command line, with which a stopped campaign goes on. Raises KeyboardInterrupt if
    it was stopped; the run is then saved.
    """
    check_matplotlib()  # before hours of training
    if is_launched():
        raise ValueError("`overnight ablate` starts its runs itself: start it without torchrun or srun")
    arms, seeds = build_arms(config, name, baseline), read_seeds(config)
    dataset = open_dataset(ensure_prepared(config.data))
    world = world_of_runs(config.compute)
    campaign = Campaign(f"ablate-{config.run_name}", dataset, world)
    command = shell_command("ablate", *words)
    check_baseline(campaign, arms[0])
    compared = [[campaign.plan_run(arm, seed, {}) for seed in seeds] for arm in arms if not arm.grid]
    tried = {arm.name: list(_tuning_runs(campaign, arm, seeds)) for arm in arms if arm.grid}
    campaign.check([run for group in (*tried.values(), *compared) for run in group])
    announce_campaign(campaign, arms, len(seeds), sum(map(len, tried.values())))
    try:
        record = run_campaign(campaign, arms, seeds, tried)
        record = dataclasses.replace(record, command=command)
        record = record if not config.step_times else measure_times(record)
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
        before = json.loads(path.read_text(encoding="utf-8"))["baseline"]
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


def _tuning_runs(campaign: Campaign, arm: Arm, seeds: Sequence[int]) -> Iterator[ArmRun]:
    for settings in arm.grid:
        label = "".join(f"-{name}-{value}" for name, value in settings.items())
        yield campaign.plan_run(arm, tuning_seed(seeds), settings, label)


def run_campaign(
    campaign: Campaign, arms: Sequence[Arm], seeds: Sequence[int], tried: Mapping[str, Sequence[ArmRun]]
) -> AblationRecord:
    """Tune, train and read everything. A run that fails is recorded, and the others go on."""
    tuning = train_all(campaign, [run for runs in tried.values() for run in runs])
    arms, notices, rows = choose_settings(arms, tried, tuning)
    runs = [[campaign.plan_run(arm, seed, chosen_of(arm, rows)) for seed in seeds] for arm in arms]
    campaign.check([run for group in runs for run in group])
    hopeless = {arm.name for arm in arms if arm.grid and not chosen_of(arm, rows)}
    in_order = [run for group in zip(*runs, strict=True) for run in group if run.arm not in hopeless]
    finals = train_all(campaign, in_order)
    missing = FinalLoss(failure="none of the runs that tune its arm has a final loss")
    results: list[ArmResult] = []
    for arm, group in zip(arms, runs, strict=True):
        found = [finals.get(run.recipe.run_name, missing) for run in group]
        results.append(summarize_arm(arm, arms[0], group, found, results[0] if results else None))
    resolved = runs[0][0].resolved
    return AblationRecord(
        name=campaign.name,
        command="",
        seeds=seeds,
        tuning_seed=tuning_seed(seeds) if rows else None,
        total_tokens=resolved.plan.tokens_before(resolved.total_steps),
        total_steps=resolved.total_steps,
        tokens_per_step=resolved.recipe.batch.tokens_per_step,
        data=str(campaign.dataset.folder),
        arms=results,
        tried=rows,
        notices=notices,
    )


def train_all(campaign: Campaign, runs: Sequence[ArmRun]) -> dict[str, FinalLoss]:
    """Train what is missing, one after another; the final losses by the runs' names."""
    finals = {}
    for number, each in enumerate(runs):
        announce(runs, number)
        failure = campaign.train(each)
        finals[each.recipe.run_name] = final = read_final(each, failure)
        if final.failure:
            echo(f"{each.directory.path}: {final.failure}; the other runs go on")
    return finals


def choose_settings(
    arms: Sequence[Arm], tried: Mapping[str, Sequence[ArmRun]], finals: Mapping[str, FinalLoss]
) -> tuple[list[Arm], list[str], list[TriedSettings]]:
    """The arms with their best settings, warnings, and the record of the tuning."""
    chosen, notices, rows = [], [], []
    for arm in arms:
        if not arm.grid:
            chosen.append(arm)
            if tried:
                notices.append(f"{arm.name} was not tuned: none of the tuned settings has a meaning for it.")
            continue
        losses = [finals[run.recipe.run_name] for run in tried[arm.name]]
        sound = [at for at, final in enumerate(losses) if final.failure is None]
        best = min(sound, key=lambda at: losses[at].loss) if sound else None
        rows += [
            TriedSettings(
                arm=arm.name,
                seed=run.seed,
                settings=run.settings,
                path=str(run.directory.path),
                final=final,
                is_chosen=at == best,
            )
            for at, (run, final) in enumerate(zip(tried[arm.name], losses, strict=True))
        ]
        if best is not None:
            notices += _at_the_end(arm, arm.grid[best])
        settings = {} if best is None else arm.grid[best]
        chosen.append(dataclasses.replace(arm, recipe=with_settings(arm.recipe, **settings)))
    return chosen, notices, rows


def _at_the_end(arm: Arm, best: Mapping[str, Any]) -> Iterator[str]:
    """A warning for each number that was best as the lowest or highest of those tried."""
    for name, value in best.items():
        values = sorted({each[name] for each in arm.grid}) if isinstance(value, int | float) else []
        if len(values) > 1 and value in {values[0], values[-1]}:
            end = "lowest" if value == values[0] else "highest"
            yield f"{arm.name}: the best {name}, {value:g}, is the {end} that was tried: try more beyond it."


def chosen_of(arm: Arm, rows: Sequence[TriedSettings]) -> dict[str, Any]:
    """The settings chosen for an arm; {} if it was not tuned, or if that failed."""
    return next((dict(row.settings) for row in rows if row.arm == arm.name and row.is_chosen), {})


def measure_times(record: AblationRecord) -> AblationRecord:
    """The record with the time of a step of each arm, timed in turn with the baseline's."""
    baseline, tokens = record.arms[0], record.tokens_per_step
    arms, notices = [baseline], [*record.notices]
    for arm in record.compared:
        times = time_in_turn(baseline.runs[0].resolved, arm.runs[0].resolved)
        if times is None:
            notices.append(
                f"{arm.name}: the steps could not be timed: both arms at once need too much memory."
            )
            arms.append(arm)
            continue
        arms.append(with_times(arm, times, tokens))
        if arms[0].step_seconds is None:
            arms[0] = dataclasses.replace(baseline, step_seconds=times.baseline_seconds, step_time_ratio=1.0)
    return dataclasses.replace(record, arms=arms, notices=notices)


def write_results(campaign: Campaign, record: AblationRecord, *, is_json: bool) -> None:
    """Print the results; write ablate.json and ablate.html into the campaign's folder."""
    found = json.dumps(ablation_to_json(record), indent=2) + "\n"
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
    finished = [
        run.directory.path
        for arm in record.arms
        for run, final in list(zip(arm.runs, arm.finals, strict=True))[:1]
        if final.failure is None
    ]
    if finished:
        echo(f"next: {shell_command('report', *finished)}")
