"""Whole runs with a mistake in the code: each must be noticed and diagnosed first. Healthy ones must not.

The mistakes are made where they usually are: in the functions that training uses, not in its settings.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
    run_curves,
    window_ends,
)
from overnight.baselines.verdict import BandComparison, compare_with_band
from overnight.data import DataConfig
from overnight.data.loader import Batch, TokenStream
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, flatten
from overnight.run import log, setup
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.training import ComputeConfig, OptimizerConfig, schedule
from overnight.training import step as step_module
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig

Patch = pytest.MonkeyPatch

STEPS, ROWS, MICRO_BATCHES, CONTEXT = 128, 32, 2, 32
SEEDS = (1, 2, 3, 4)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invent_text(seed: int) -> str:
    """A document in which each letter is followed by one of four, the first most often."""
    language, text = random.Random(0), random.Random(seed)
    following = {letter: language.sample(LETTERS, 4) for letter in LETTERS}
    written = [text.choice(LETTERS)]
    while len(written) < 1500:
        written += text.choices(following[written[-1]], (8, 4, 2, 1))
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
    prepare_shards(config)
    return root / "shards"


def recipe_on(text: Path, seed: int) -> Recipe:
    """A run that takes a second."""
    return Recipe(
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


def train(recipe: Recipe, folder: Path) -> RunDirectory:
    directory = RunDirectory(folder)
    train_module.train_recipe(recipe, directory)
    return directory


@pytest.fixture(scope="module")
def healthy(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDirectory]:
    """A run of each seed."""
    root = tmp_path_factory.mktemp("healthy")
    return {seed: train(recipe_on(text, seed), root / str(seed)) for seed in SEEDS}


@pytest.fixture(scope="module")
def band(text: Path, healthy: dict[int, RunDirectory]) -> ReferenceBand:
    """Recorded from healthy runs."""
    runs = []
    for directory in healthy.values():
        lines = directory.read_metrics()
        ends = [lines[step - 1]["tokens"] for step in window_ends(STEPS)]
        runs.append(run_curves(columns_of(lines), directory.read_events("evaluations"), ends))
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
        curves=record_curves(runs),
    )


@pytest.fixture
def patch_reference(band: ReferenceBand, monkeypatch: Patch) -> None:
    """Let runs find the band while they train."""
    monkeypatch.setattr(log, "find_band", lambda settings, text: find_band(settings, text, [band]))


def compare(directory: RunDirectory, band: ReferenceBand, recipe: Recipe) -> BandComparison:
    columns, evaluations = columns_of(directory.read_metrics()), directory.read_events("evaluations")
    found = compare_with_band(band, columns, evaluations, flatten(recipe))
    assert found is not None
    return found


def test_healthy_run_with_another_seed_is_on_track(text: Path, band: ReferenceBand, tmp_path: Path) -> None:
    recipe = recipe_on(text, 11)
    verdict = compare(train(recipe, tmp_path / "run"), band, recipe)
    assert verdict.is_on_track, verdict.sentences()
    assert verdict.differences == ()


def test_reference_does_not_change_a_run(
    text: Path,
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
    assert "on_track" not in healthy[1].read_events("evaluations")[-1]
    assert "reference" not in capsys.readouterr().err


# The mistakes, each where it is usually made: what replaces the right function.


def scaled_rate(right: Any, factor: float) -> Any:
    """The schedule returns another multiple of the peak."""
    return lambda *given: factor * right(*given)


def constant_schedule(right: Any) -> Any:
    """After warm-up the rate stays."""
    return lambda position, length, config: min(1.0, (position + 1) / config.warmup_steps)


def other_applied_rate(right: Any, change: Callable[[float], float]) -> Any:
    """The optimizer's rate is not the one that is logged."""
    return lambda *given: right(*given[:-1], change(given[-1]))


def without_residual_scale(right: Any) -> Any:
    def draw(shapes: Mapping[str, torch.Size], n_layer: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        for name, weight in right(shapes, n_layer, seed):
            yield name, weight * math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else weight

    return draw


def torch_embeddings(right: Any) -> Any:
    """N(0, 1), as torch initialises them."""

    def draw(*given: Any) -> Iterator[tuple[str, Tensor]]:
        for name, weight in right(*given):
            yield name, torch.randn_like(weight) if name in {"wte.weight", "wpe.weight"} else weight

    return draw


def dropout_on(right: Any) -> Any:
    """Whatever the recipe says."""
    return lambda x, _p, training: right(x, 0.2, training)


def exploding_gradients(right: Any) -> Any:
    """Now and then a kernel overflows, and nothing is clipped."""
    calls = itertools.count(1)

    def clip(parameters: Any, _limit: float | None) -> Tensor:
        if next(calls) % 30 == 0:
            for parameter in parameters:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=100.0)
        found: Tensor = right(parameters, None)
        return found

    return clip


def scaled_loss(right: Any, factor: float) -> Any:
    """The loss is scaled for the backward pass, and the gradients are not scaled back."""
    return lambda scaler, loss: factor * loss


def data_repeating(right: Any) -> Any:
    """The row number wraps around too early."""
    return lambda stream, first, rows: right(stream, first % 32, rows)


def tokens_shuffled(right: Any) -> Any:
    """A row's tokens come in any order."""

    def batch(stream: TokenStream, first_row: int, rows: int) -> Batch:
        found = right(stream, first_row, rows)
        tokens = torch.cat([found.ids, found.targets[:, -1:]], dim=1)
        order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(first_row))
        return Batch(tokens[:, order[:-1]], tokens[:, order[1:]])

    return batch


def decay_on_everything(right: Any) -> Any:
    def build(*given: Any) -> torch.optim.AdamW:
        optimizer: torch.optim.AdamW = right(*given)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        return optimizer

    return build


def no_causal_mask(right: Any) -> Any:
    """Attention looks both ways."""
    return lambda *given, **named: right(*given, **named | {"is_causal": False})


RATE, APPLIED = (schedule, "learning_rate_multiplier"), (step_module, "step_if")
WEIGHTS, BATCH = (setup, "init_weights"), (TokenStream, "batch")
FACTOR, SCHEDULE = "the learning rate is off by a factor", "the learning-rate schedule is off"
SCALED = (torch.amp.GradScaler, "scale")
SUMMED = "gradients are summed over micro-batches, not averaged"
MISTAKES = (
    (RATE, constant_schedule, SCHEDULE),
    (APPLIED, partial(other_applied_rate, change=lambda rate: 8e-3), SCHEDULE),
    (WEIGHTS, without_residual_scale, "the initialisation lacks the residual scale"),
    (WEIGHTS, torch_embeddings, "the initial weights are different"),
    ((F, "dropout"), dropout_on, "dropout is on"),
    ((step_module, "clip_gradients"), exploding_gradients, "gradients explode"),
    (SCALED, partial(scaled_loss, factor=1024.0), "gradients are scaled and not scaled back"),
    (BATCH, data_repeating, "the training data repeats"),
    (BATCH, tokens_shuffled, "tokens are shuffled within rows"),
    ((setup, "build_sharded_optimizer"), decay_on_everything, "layer norms are decayed"),
    (RATE, partial(scaled_rate, factor=10.0), FACTOR),
    (SCALED, partial(scaled_loss, factor=MICRO_BATCHES), SUMMED),
    ((F, "scaled_dot_product_attention"), no_causal_mask, "the model sees the tokens it predicts"),
)


@pytest.mark.parametrize("place, replace, name", MISTAKES)
def test_mistake_in_the_code_is_diagnosed(
    text: Path,
    band: ReferenceBand,
    tmp_path: Path,
    monkeypatch: Patch,
    place: tuple[Any, str],
    replace: Callable[[Any], Any],
    name: str,
) -> None:
    recipe = recipe_on(text, 21)
    monkeypatch.setattr(*place, replace(getattr(*place)))
    verdict = compare(train(recipe, tmp_path / "run"), band, recipe)
    assert not verdict.is_on_track
    assert verdict.causes, verdict.sentences()
    assert verdict.causes[0].name == name, verdict.sentences()


def test_run_that_leaves_its_reference_prints_a_line_when_that_changes(
    text: Path, tmp_path: Path, monkeypatch: Patch, patch_reference: None, capsys: Any
) -> None:
    monkeypatch.setattr(TokenStream, "batch", tokens_shuffled(TokenStream.batch))
    directory = train(recipe_on(text, 21), tmp_path / "run")
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "its reference" in line]
    briefs = [(line["on_track"], line["likely_mistake"]) for line in directory.read_events("evaluations")]
    mistake = "tokens are shuffled within rows"
    assert briefs[0] == ("within", None)
    assert len(lines) == sum(now != then for then, now in itertools.pairwise(briefs)) > 0
    assert lines[-1].startswith("above its reference (tiny, 4 recorded runs): ")
    assert mistake in lines[-1]
    status = describe_run(directory.path)
    assert (status.on_track, status.likely_mistake) == ("above", mistake)
