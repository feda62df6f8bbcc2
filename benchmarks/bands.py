"""Records how healthy runs of a recipe look, as the reference that `overnight` lays beside other runs.

    python benchmarks/bands.py --recipe quickstart --seeds 5 --write quickstart.json

Trains the recipe once for each seed, into runs/bands of the current folder, and takes a run that is finished
there already as it is. Then each run is laid beside the band of the others: how near it comes to an edge
shows how much room a band leaves. The package reads those that lie in src/overnight/baselines/bands/.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import measure
from overnight import __version__
from overnight.baselines.band import (
    DEFAULT_IDENTITY,
    BandCurve,
    ReferenceBand,
    RunCurves,
    Series,
    columns_of,
    run_curves,
)
from overnight.baselines.verdict import band_deviations
from overnight.config import from_toml
from overnight.recipe import Recipe, flatten, load_recipe
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig

LOSSES = ("validation loss", "training loss")
HEADINGS = ("seed", *LOSSES, "nearest to an edge", "at tokens", "of its half width")


class Run(NamedTuple):
    """A finished run."""

    seed: int
    recipe: Recipe
    """With everything decided."""
    text: Mapping[str, Any]
    """Its data.json."""
    course: RunCurves


def train(recipe: Recipe, folder: Path, evaluations: int) -> RunDirectory:
    """The run of this recipe and seed in `folder`; trained unless it is there and finished."""
    steps = recipe.schedule.total_steps
    if steps is None:
        raise ValueError(f"the recipe {recipe.run_name} gives total_tokens: give it as --total-steps")
    directory = RunDirectory(folder / f"{recipe.run_name}-{recipe.seed}")
    if not directory.is_finished(steps):
        every = math.ceil(steps / evaluations)
        often = replace(recipe.evaluation, evaluate_every_steps=every)
        train_module.train_recipe(replace(recipe, evaluation=often), directory, resume=directory.exists())
    return directory


def read(directory: RunDirectory) -> Run:
    """What a finished run's files tell."""
    recipe = from_toml(Recipe, directory.recipe.read_text(encoding="utf-8"), str(directory.recipe))
    lines = directory.read_metrics()
    ends = [lines[step - 1]["tokens"] for step in window_ends(len(lines))]
    course = run_curves(columns_of(lines), directory.read_events("evaluations"), ends)
    return Run(recipe.seed, recipe, json.loads(directory.data.read_text(encoding="utf-8")), course)


def unigram_nats(run: Run) -> float:
    """The entropy of the training text's single tokens."""
    from overnight.data.shards import open_tokens

    folder = Path(run.recipe.data.data)
    counts = np.zeros(run.text["vocab_size"], np.int64)
    for shard in run.text["train"]:
        counts += np.bincount(open_tokens(folder / shard["name"]), minlength=counts.size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def build_band(name: str, runs: Sequence[Run]) -> ReferenceBand:
    """The band of these runs, which must be of one recipe on one text."""
    identity, settings = describe_settings(flatten(runs[0].recipe))
    facts = {key: runs[0].text[key] for key in TEXT}
    for run in runs[1:]:
        if (identity, settings) != describe_settings(flatten(run.recipe)):
            raise ValueError(f"the runs of seeds {runs[0].seed} and {run.seed} are not of one recipe")
        if facts != {key: run.text[key] for key in TEXT}:
            raise ValueError(f"the runs of seeds {runs[0].seed} and {run.seed} are not on one text")
    compute = runs[0].recipe.compute
    return ReferenceBand(
        recipe=name,
        source=f"{len(runs)} recorded runs",
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        notes=f"Recorded with overnight {__version__} on {compute.device} in {compute.precision}.",
        identity=identity,
        settings=settings,
        text={key: (value,) for key, value in facts.items()},
        unigram_nats=unigram_nats(runs[0]),
        curves=record_curves([run.course for run in runs]),
    )


# The curves of several healthy runs that differ in their seed.

WINDOWS = 40
"""Approximate number of averaging windows of a run; the first are shorter, since the loss falls fast."""
HALF_WIDTH = 4.0
"""Half of a band's width in standard deviations: a run is compared at a hundred points, and a few seeds
estimate their spread only roughly."""
NEIGHBOURS = 2
"""Points on each side whose spread is pooled with a point's own."""
MIN_HALF_WIDTH = {
    "loss": 0.01,
    "validation_loss": 0.01,
    "gap": 0.02,
    "grad_norm": 0.1,
    "grad_norm_peak": 0.25,
    "learning_rate": 0.01,
    "norm_gain": 0.005,
    "residual_ratio": 0.1,
}
"""The least half width of each curve: as a share of the middle, the gap in nats. Chosen, not measured: the
effect of another library version, number of threads or precision on a healthy run."""
LOG_SCALE = frozenset({"grad_norm", "grad_norm_peak"})
"""Quantities that vary by factors."""
IDENTITY = (
    *("n_layer", "n_head", "n_embd", "context_length", "vocab_size", "init_from"),
    *("total_steps", "tokens_per_step", "batch_ramp_start_tokens", "batch_ramp_tokens"),
    *DEFAULT_IDENTITY,
)
"""Settings that define the experiment: a run with other values has no reference."""
SETTINGS = (
    "dropout",
    *(each.name for each in fields(OptimizerConfig) if each.name not in DEFAULT_IDENTITY),
    *("warmup_steps", "learning_rate_decay", "decay_steps", "final_learning_rate_fraction"),
    *("packing", "shuffle_window", "validation_fraction", "near_duplicates", "evaluation_tokens"),
)
"""Settings that change the curves: reported where they differ."""
TEXT = ("source", "tokenizer", "tokenizer_fingerprint")
"""Fields of data.json that identify a text."""


def window_ends(total_steps: int) -> list[int]:
    """The steps at which windows end: 1, 2, 4, ... up to a fortieth of the run, then evenly spaced."""
    longest = max(1, math.ceil(total_steps / WINDOWS))
    ends = [1]
    while ends[-1] < total_steps:
        ends.append(min(total_steps, ends[-1] + min(ends[-1], longest)))
    return ends


def record_curves(runs: Sequence[RunCurves]) -> dict[str, BandCurve]:
    """The bands of the curves that all runs have, at the tokens where all have a point.

    Raises ValueError for fewer than two runs, and for values that are not finite.
    """
    if len(runs) < 2:
        raise ValueError("a band needs at least two runs: give more seeds")
    names = [name for name in MIN_HALF_WIDTH if all(name in run for run in runs)]
    return {name: _band_curve(name, [dict(run[name]) for run in runs]) for name in names}


def describe_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`IDENTITY` and `SETTINGS` among a recipe's flat settings."""
    return {name: settings.get(name) for name in IDENTITY}, {name: settings.get(name) for name in SETTINGS}


def _band_curve(name: str, runs: Sequence[Mapping[int, float]]) -> BandCurve:
    """The band of one curve from each run's values by tokens."""
    tokens = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[at] for run in runs] for at in tokens])
    if name in LOG_SCALE:
        values = np.log(values)
    if not np.isfinite(values).all():
        raise ValueError(f"a run whose {name} is not finite can't be a reference: leave it out")
    middle, variances = values.mean(axis=1), values.var(axis=1, ddof=1)
    start = int(tokens[0] == 0)  # before the first step the runs differ only in their initial weights
    variances[start:] = _pooled(variances[start:], len(runs))
    least = MIN_HALF_WIDTH[name] * (1.0 if name == "gap" else np.abs(middle))
    if name in LOG_SCALE:
        least = np.log1p(MIN_HALF_WIDTH[name])
    half = np.maximum(least, HALF_WIDTH * np.sqrt(variances * (1 + 1 / len(runs))))  # of a new run
    edges = np.stack([middle - half, middle, middle + half])
    if name in LOG_SCALE:
        edges = np.exp(edges)
    has_width = edges[0] < edges[2]  # weights that begin at 0 are 0 in all runs: nothing to compare
    low, middles, high = (tuple(float(f"{value:.6g}") for value in edge) for edge in edges[:, has_width])
    return BandCurve(tokens=tuple(np.array(tokens)[has_width].tolist()), low=low, middle=middles, high=high)


def _pooled(variances: Series, runs: int) -> list[float]:
    """At each point, the larger of the point's own variance and that of its neighbours.

    Their variances are pooled as logarithms, since they fall by factors during a run. The logarithm of a
    variance of few runs is too small on average, by ln x - digamma(x) with x = (runs - 1) / 2, which is about
    1 / 2x + 1 / 12x^2.
    """
    degrees = runs - 1
    correction = 1 / degrees + 1 / (3 * degrees**2)
    pooled = []
    for at, own in enumerate(variances):
        around = variances[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
        around = around[around > 0]
        pooled.append(max(float(own), math.exp(np.log(around).mean() + correction) if around.size else 0.0))
    return pooled


def open_to_versions(band: ReferenceBand, share: float) -> ReferenceBand:
    """The band for other versions of its text as well, whose tokenizer is another: losses widened by a share.

    Of the gap, in nats, as much as of the validation loss beside it.
    """
    curves = dict(band.curves)
    for name in ("loss", "validation_loss", "gap"):
        curve, beside = curves[name], band.curves["loss" if name == "loss" else "validation_loss"]
        rooms = [share * beside.middle[beside.tokens.index(tokens)] for tokens in curve.tokens]
        curves[name] = replace(
            curve,
            low=tuple(round(low - room, 6) for low, room in zip(curve.low, rooms, strict=True)),
            high=tuple(round(high + room, 6) for high, room in zip(curve.high, rooms, strict=True)),
        )
    text = {key: known for key, known in band.text.items() if key != "tokenizer_fingerprint"}
    told = f"Losses are widened by {share:.0%}, for the text differs a little with its version."
    return replace(band, curves=curves, text=text, notes=f"{band.notes} {told}")


def hold_out(runs: Sequence[Run], at: int) -> list[str]:
    """A run beside the band of the others, as a row of the table."""
    others = record_curves([run.course for place, run in enumerate(runs) if place != at])
    found = band_deviations(runs[at].course, others)
    worst = max(found, key=lambda name: max(abs(each.z) for each in found[name]))
    place = max(found[worst], key=lambda each: abs(each.z))
    last = {name: runs[at].course[name][-1].value for name in ("validation_loss", "loss")}
    return [
        str(runs[at].seed),
        f"{last['validation_loss']:.4f}",
        f"{last['loss']:.4f}",
        worst,
        f"{place.tokens:,}",
        f"{abs(place.z):.2f}",
    ]


def record(options: argparse.Namespace) -> measure.Report:
    """Train what is missing, and write the band. Raises ValueError for invalid options."""
    if options.seeds < 2:
        raise ValueError(f"--seeds {options.seeds} is too few for a band: give 3 or more")
    recipe = load_recipe(options.recipe)
    runs = [
        read(train(replace(recipe, seed=seed), options.folder, options.evaluations))
        for seed in range(1, options.seeds + 1)
    ]
    band = build_band(recipe.run_name, runs)
    if options.other_versions is not None:
        band = open_to_versions(band, options.other_versions)
    if options.write is not None:
        options.write.write_text(band.to_json(), encoding="utf-8")
    return measure.Report(
        title=f"Healthy runs of {recipe.run_name}, each beside the band of the others",
        headings=HEADINGS,
        rows=[hold_out(runs, at) for at in range(len(runs))] if len(runs) > 2 else [],
        measured={str(run.seed): run.course for run in runs},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--recipe", required=True, help="its name, or a .toml file")
    parser.add_argument("--seeds", type=int, default=5, help="train with the seeds 1, 2, ... to this one")
    parser.add_argument("--evaluations", type=int, default=20, help="of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/bands"), help="where the runs are kept")
    parser.add_argument("--other-versions", type=float, help="widen losses by this share, for any version")
    parser.add_argument("--write", type=Path, help="the band's file")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, record)
