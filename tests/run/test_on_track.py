"""Whole runs with a mistake in the code: each must be noticed, and named first. Healthy ones must not.

The mistakes are put where they are made: into the functions that training uses, not into its settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overnight.baselines.band import (
    ReferenceBand,
    columns_of,
    describe_settings,
    find_band,
    record_curves,
    run_stats,
    window_ends,
)
from overnight.baselines.verdict import BandComparison, compare_with_band
from overnight.data import DataConfig
from overnight.data.loader import TokenStream
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, flatten
from overnight.run import log, setup
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training import step as step_module
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig
from overnight.training.state import TrainState

STEPS, ROWS, MICRO_BATCHES, CONTEXT = 128, 32, 2, 32
SEEDS = (1, 2, 3, 4)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invent_text(seed: int) -> str:
    """A document in which each letter is followed by one of four, the first of them most often."""
    of_language, of_text = random.Random(0), random.Random(seed)
    following = {letter: of_language.sample(LETTERS, 4) for letter in LETTERS}
    written = [of_text.choice(LETTERS)]
    while len(written) < 1500:
        written += of_text.choices(following[written[-1]], (8, 4, 2, 1))
    return "".join(written) + "\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 130 invented documents, in characters."""
    root = tmp_path_factory.mktemp("invented")
    for number in range(130):
        (root / f"{number:03}.txt").write_text(invent_text(number))
    config = PrepareConfig(
        source=str(root), out=str(root / "shards"), tokenizer="characters", validation_fraction=0.1
    )
    prepare(config)
    return root / "shards"


def recipe_on(text: Path, seed: int, **changes: Any) -> Recipe:
    """A run of a second."""
    tiny = Recipe(
        run_name="tiny",
        seed=seed,
        data=DataConfig(data=str(text)),
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT),
        optimizer=OptimizerConfig(peak_learning_rate=8e-3),
        schedule=ScheduleConfig(total_steps=STEPS, warmup_steps=10),
        batch=BatchConfig(tokens_per_step=ROWS * CONTEXT, micro_batch_size=ROWS // MICRO_BATCHES),
        compute=ComputeConfig(device="cpu", precision="fp32", compile=False),
        evaluation=EvaluationConfig(evaluate_every_steps=32, evaluation_tokens=4096),
        checkpoints=CheckpointsConfig(checkpoint_every_steps=None),
    )
    return dataclasses.replace(tiny, **changes)


def train(recipe: Recipe, folder: Path) -> RunDirectory:
    directory = RunDirectory(folder)
    train_module.run(recipe, directory)
    return directory


@pytest.fixture(scope="module")
def healthy(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDirectory]:
    """A run of each seed."""
    root = tmp_path_factory.mktemp("healthy")
    return {seed: train(recipe_on(text, seed), root / str(seed)) for seed in SEEDS}


@pytest.fixture(scope="module")
def band(text: Path, healthy: dict[int, RunDirectory]) -> ReferenceBand:
    """Recorded from healthy runs."""
    courses = []
    for directory in healthy.values():
        lines = directory.read_metrics()
        ends = [lines[step - 1]["tokens"] for step in window_ends(STEPS)]
        courses.append(run_stats(columns_of(lines), directory.read_events("evaluations"), ends))
    ids = np.concatenate([np.fromfile(path, np.uint16)[512:] for path in sorted(text.glob("train*.bin"))])
    shares = np.unique(ids, return_counts=True)[1] / ids.size
    identity, settings = describe_settings(flatten(recipe_on(text, 0)))
    return ReferenceBand(
        recipe="tiny",
        source=f"{len(SEEDS)} recorded runs",
        date="2026-11-21",
        identity={name: value for name, value in identity.items() if name != "vocab_size"},
        settings=settings,
        text={},
        unigram_nats=float(-(shares * np.log(shares)).sum()),
        curves=record_curves(courses),
    )


@pytest.fixture
def patch_reference(band: ReferenceBand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs find the band while they train."""
    monkeypatch.setattr(log, "find_band", lambda settings, text: find_band(settings, text, [band]))


def verdict_on(directory: RunDirectory, band: ReferenceBand, recipe: Recipe) -> BandComparison:
    found = compare_with_band(
        band,
        columns_of(directory.read_metrics()),
        directory.read_events("evaluations"),
        flatten(recipe),
    )
    assert found is not None
    return found


@pytest.mark.parametrize("seed", [11])
def test_a_healthy_run_with_another_seed_is_on_track(
    text: Path, band: ReferenceBand, tmp_path: Path, seed: int
) -> None:
    recipe = recipe_on(text, seed)
    verdict = verdict_on(train(recipe, tmp_path / "run"), band, recipe)
    assert verdict.is_on_track, verdict.sentences()
    assert verdict.differences == ()


def test_a_run_with_a_reference_is_the_run_without(
    text: Path,
    band: ReferenceBand,
    healthy: dict[int, RunDirectory],
    tmp_path: Path,
    patch_reference: None,
    capsys: Any,
) -> None:
    directory = train(recipe_on(text, 1), tmp_path / "run")
    facts = ("step", "loss", "grad_norm", "learning_rate")
    now, then = (
        [[line[name] for name in facts] for line in each.read_metrics()] for each in (directory, healthy[1])
    )
    assert now == then
    assert {line["on_track"] for line in directory.read_events("evaluations")} == {"within"}
    assert describe_run(directory.path).on_track == "within"
    assert "on_track" not in healthy[1].read_events("evaluations")[-1]  # nobody told it of a reference
    assert "reference" not in capsys.readouterr().err


# ---------------------------------------------------------------- the mistakes, each where it is made


def scale_gradients(parameters: Any, factor: float) -> None:
    for parameter in parameters:
        parameter.grad.mul_(factor)


def rate_times(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """The schedule's function returns another multiple of the peak."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        right = train_module.learning_rate_multiplier
        patch.setattr(train_module, "learning_rate_multiplier", lambda *given: factor * right(*given))

    return inject


def rate_applied_times_ten(patch: pytest.MonkeyPatch) -> None:
    """The optimizer's rate is not the one that is logged."""
    right = step_module.apply_gradients
    patch.setattr(
        step_module,
        "apply_gradients",
        lambda optimizer, parameters, rate, *rest: right(optimizer, parameters, 10 * rate, *rest),
    )


def schedule_without_end(patch: pytest.MonkeyPatch) -> None:
    """After warm-up the rate stays."""
    patch.setattr(
        train_module,
        "learning_rate_multiplier",
        lambda position, length, config: min(1.0, (position + 1) / config.warmup_steps),
    )


def optimizer_deaf_to_its_schedule(patch: pytest.MonkeyPatch) -> None:
    """The rate is worked out, logged, and never given to the optimizer."""
    right = step_module.apply_gradients
    patch.setattr(
        step_module,
        "apply_gradients",
        lambda optimizer, parameters, rate, *rest: right(optimizer, parameters, 8e-3, *rest),
    )


def no_residual_scale(patch: pytest.MonkeyPatch) -> None:
    """c_proj is drawn as wide as everything else."""
    right = setup.draw_weights

    def draw(shapes: Mapping[str, torch.Size], n_layer: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        for name, weight in right(shapes, n_layer, seed):
            yield name, weight * math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else weight

    patch.setattr(setup, "init_weights", draw)


def no_initialisation(patch: pytest.MonkeyPatch) -> None:
    """Embeddings as torch makes them: N(0, 1)."""
    right = setup.draw_weights

    def draw(*given: Any) -> Iterator[tuple[str, Tensor]]:
        for name, weight in right(*given):
            yield name, torch.randn_like(weight) if name in {"wte.weight", "wpe.weight"} else weight

    patch.setattr(setup, "init_weights", draw)


def dropout_of(share: float) -> Callable[[pytest.MonkeyPatch], None]:
    """It drops, whatever the recipe says."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        right = F.dropout
        patch.setattr(F, "dropout", lambda x, _p, training: right(x, share, training))

    return inject


def exploding_gradients(patch: pytest.MonkeyPatch) -> None:
    """Now and then a kernel overflows, and nothing is clipped."""
    right, calls = step_module.apply_gradients, []

    def apply(optimizer: Any, parameters: Any, rate: float, _limit: float | None, *rest: Any) -> Any:
        calls.append(rate)
        if len(calls) % 30 == 0:
            for parameter in parameters:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=100.0)
        return right(optimizer, parameters, rate, None, *rest)

    patch.setattr(step_module, "apply_gradients", apply)


def loss_scaled_and_not_unscaled(patch: pytest.MonkeyPatch) -> None:
    """The loss is scaled for the backward pass, as float16 needs it, and the gradients are used so."""
    right = setup.build_training

    def build(of: Any) -> Any:
        training = right(of)
        of.state.scaler.scale = lambda loss: 1024.0 * loss
        return training

    patch.setattr(train_module, "build_training", build)


def gradients_summed(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch's loss is divided by its own tokens, and the sum by nothing."""
    right = setup.build_training

    def build(of: Any) -> Any:
        training = right(of)
        of.state.scaler.scale = lambda loss: MICRO_BATCHES * loss
        return training

    patch.setattr(train_module, "build_training", build)


def data_repeating(patch: pytest.MonkeyPatch) -> None:
    """The row number wraps around too soon."""
    right = TokenStream.batch
    patch.setattr(TokenStream, "batch", lambda stream, first, rows: right(stream, first % 32, rows))


def tokens_shuffled(patch: pytest.MonkeyPatch) -> None:
    """A row's tokens come in any order."""
    right = TokenStream._read_window

    def read(stream: TokenStream, row: int, stretch: Any) -> None:
        right(stream, row, stretch)
        np.random.default_rng(row).shuffle(stretch)

    patch.setattr(TokenStream, "_read_window", read)


def decay_on_everything(patch: pytest.MonkeyPatch) -> None:
    """One group for all parameters."""
    right = TrainState.__init__

    def begin(state: TrainState, model: Any, optimizer: Any, **rest: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        right(state, model, optimizer, **rest)

    patch.setattr(TrainState, "__init__", begin)


def no_causal_mask(patch: pytest.MonkeyPatch) -> None:
    """Attention looks both ways."""
    right = F.scaled_dot_product_attention
    patch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *given, **named: right(*given, **{**named, "is_causal": False}),
    )


MISTAKES = (
    (schedule_without_end, "the learning-rate schedule is off"),
    (optimizer_deaf_to_its_schedule, "the learning-rate schedule is off"),
    (no_residual_scale, "the initialisation lacks the residual scale"),
    (no_initialisation, "the weights begin otherwise"),
    (dropout_of(0.2), "dropout is on"),
    (exploding_gradients, "gradients explode"),
    (loss_scaled_and_not_unscaled, "gradients are scaled and not scaled back"),
    (data_repeating, "the training data repeats"),
    (tokens_shuffled, "tokens are shuffled within rows"),
    (decay_on_everything, "layer norms are decayed"),
    (rate_times(10.0), "the learning rate is off by a factor"),
    pytest.param(rate_times(0.1), "the learning rate is off by a factor", marks=pytest.mark.slow),
    pytest.param(rate_applied_times_ten, "the learning rate is off by a factor", marks=pytest.mark.slow),
    (gradients_summed, "gradients are summed over micro-batches, not averaged"),
    (no_causal_mask, "the model sees what it is to predict"),
)


@pytest.mark.parametrize("inject, name", MISTAKES)
def test_a_mistake_in_the_code_is_noticed_and_named(
    text: Path,
    band: ReferenceBand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inject: Callable[[pytest.MonkeyPatch], None],
    name: str,
) -> None:
    recipe = recipe_on(text, 21)
    inject(monkeypatch)
    verdict = verdict_on(train(recipe, tmp_path / "run"), band, recipe)
    assert not verdict.is_on_track
    assert verdict.findings, verdict.sentences()
    assert verdict.findings[0].name == name, verdict.sentences()


def test_a_run_that_leaves_its_reference_says_so_when_that_changes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch_reference: None, capsys: Any
) -> None:
    tokens_shuffled(monkeypatch)
    directory = train(recipe_on(text, 21), tmp_path / "run")
    told = [line.strip() for line in capsys.readouterr().err.splitlines() if "its reference" in line]
    briefs = [(line["on_track"], line["likely_mistake"]) for line in directory.read_events("evaluations")]
    assert briefs[0] == ("within", None)
    assert len(told) == sum(now != then for then, now in itertools.pairwise(briefs)) > 0
    assert told[-1].startswith("above its reference (tiny, 4 recorded runs): ")
    assert "; likeliest: tokens are shuffled within rows, since the training loss stays at " in told[-1]
    status = describe_run(directory.path)
    assert (status.on_track, status.likely_mistake) == ("above", "tokens are shuffled within rows")
