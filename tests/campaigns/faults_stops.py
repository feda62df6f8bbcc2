"""R1: runs are told to stop at random steps, again and again, and go on to the same bits."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from faults_kills import forget_moments
from faults_trials import (
    DONE,
    INTERRUPTED,
    Before,
    Place,
    finish,
    record,
    report,
    train,
)
from mutants import replace
from report import Report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STEPS_AT_MOST = 6


def stop_after_lines(lines: int, mutant: Before | None = None) -> None:
    """In the new process: it gets SIGTERM when it has written so many lines of metrics."""
    from overnight.run_directory import RunDirectory

    if mutant is not None:
        mutant()
    append, left = RunDirectory.append_metrics, [lines]

    def append_and_stop(self: RunDirectory, line: Any) -> None:
        append(self, line)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    replace("overnight.run_directory:RunDirectory.append_metrics", append_and_stop)


def same_noise_each_time() -> None:
    """A mutant: dropout draws from torch's own generator, whose state nobody saves."""
    import torch

    torch.manual_seed(1)
    replace("overnight.training.step:seed_dropout", lambda *_: None)


def draw_settings(draw: random.Random) -> dict[str, object]:
    """A recipe: dropout or none, micro-batches of any size, a few epochs of a few shards."""
    rows = draw.choice([24, 48])
    return {
        "steps": draw.randrange(8, 17),
        "dropout": draw.choice([0.0, 0.1, 0.3]),
        "tokens_per_step": 32 * rows,
        "rows": draw.choice([size for size in (4, 6, 8, 12, 24) if rows % size == 0]),
        "evaluate": draw.randrange(2, 6),
        "save": draw.randrange(2, 9),
    }


def essence(folder: Path) -> dict[str, Any]:
    """The record, of the checkpoints the newest only: a stop saves more of them than the recipe asks for."""
    found = record(folder)
    newest = max(name.partition("/")[0] for name in found["checkpoints"])
    kept = {name: digest for name, digest in found["checkpoints"].items() if name.startswith(newest)}
    return found | {"checkpoints": kept}


def stop_and_go_on(folder: Path, draw: random.Random, mutant: Before | None = None) -> int:
    """Stop after a few steps, again and again; returns how often. Raises ValueError if there is no end."""
    for stops in range(100):
        ended = train(folder, functools.partial(stop_after_lines, draw.randint(1, STEPS_AT_MOST), mutant))
        if ended.status == DONE:
            return stops
        if ended.status != INTERRUPTED or "stopped and saved after step" not in ended.said:
            raise ValueError(f"{folder}: status {ended.status}: {ended.said[-1000:]}")
    raise ValueError(f"{folder} does not come to its end")


def measure_stops(place: Place, counts: dict[str, Any], seed: int) -> Report:
    """R1. Raises ValueError if a run differs, or a mutant is not caught."""
    draw, stops, schedules = random.Random(seed), [], counts["schedules"]
    recipes = -(-schedules // counts["of_each"])
    for number in range(schedules):
        if number % counts["of_each"] == 0:
            settings = draw_settings(draw)
            peace = place.new(f"peace-{number}", **settings)
            finish(peace)
            expected = essence(peace)
        folder = place.new(f"stopped-{number}", **settings)
        stops.append(stop_and_go_on(folder, draw))
        found = essence(folder)
        if found != expected:
            parts = [part for part in found if found[part] != expected[part]]
            raise ValueError(f"schedule {number} of {settings}: {', '.join(parts)} differ")
        shutil.rmtree(folder)
    controls = [
        [f"control, a mutant that {words}: noticed", catch_stopped(place, mutant, seed)]
        for mutant, words in (
            (forget_moments, "loses the moments"),
            (same_noise_each_time, "leaves dropout to torch's generator"),
        )
    ]
    return report(
        title="R1: stopped and resumed, to the bit",
        rows=[
            ["recipes drawn: dropout, accumulation, epochs, shards", str(recipes)],
            ["schedules of stops", str(schedules)],
            ["stops in all", str(sum(stops))],
            ["the same weights, moments, metrics and events, to the bit", f"{schedules}/{schedules}"],
            *controls,
        ],
        measured={"stops": stops},
        settings={"seed": seed},
    )


def catch_stopped(place: Place, mutant: Before, seed: int) -> str:
    """A mutant must end otherwise when it is stopped than undisturbed. Raises ValueError if it does not."""
    name, settings = mutant.__name__, {"steps": 9, "dropout": 0.1}  # type: ignore[attr-defined]
    whole = place.new(f"{name}-whole", **settings)
    finish(whole, mutant)
    stopped = place.new(f"{name}-stopped", **settings)
    stop_and_go_on(stopped, random.Random(seed), mutant)
    if essence(stopped) == essence(whole):
        raise ValueError(f"the mutant {name} was not caught: the campaign proves nothing")
    return "1/1"
