"""Whole runs with a mistake in the code: each must be noticed and diagnosed first. Healthy ones must not.

The mistakes are made where they usually are: in the functions that training uses, not in its settings.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from overnight.baselines.band import columns_of, find_band
from overnight.baselines.verdict import compare_with_band
from overnight.data.loader import Batch, TokenStream
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe, flatten, read_recipe_of, with_settings
from overnight.run import log, setup
from overnight.run import train as train_module
from overnight.run_directory import RunDirectory
from overnight.runs.status import describe_run
from overnight.training import schedule
from overnight.training import step as step_module

MICRO_BATCHES = 2
SETTINGS = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32},
    **{"total_steps": 128, "warmup_steps": 10, "peak_learning_rate": 8e-3},
    **{"tokens_per_step": 32 * 32, "micro_batch_size": 32 // MICRO_BATCHES},
    **{"device": "cpu", "precision": "fp32", "compile": False},
    **{"evaluate_every_steps": 32, "evaluation_tokens": 4096, "checkpoint_every_steps": None},
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invent_text(seed):
    """A document in which each letter is followed by one of four, the first most often."""
    language, text = random.Random(0), random.Random(seed)
    following = {letter: language.sample(LETTERS, 4) for letter in LETTERS}
    written = [text.choice(LETTERS)]
    while len(written) < 1500:
        written += text.choices(following[written[-1]], (8, 4, 2, 1))
    return "".join(written) + "\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Shards of 130 invented documents, in characters."""
    root = tmp_path_factory.mktemp("invented")
    for number in range(130):
        (root / f"{number:03}.txt").write_text(invent_text(number))
    paths = {"source": str(root), "out": str(root / "shards")}
    prepare_shards(PrepareConfig(**paths, tokenizer="characters", validation_fraction=0.1))
    return root / "shards"


@pytest.fixture(scope="module")
def train(text):
    """`train(seed, folder)`: the directory of a run that takes a second."""

    def train(seed, folder):
        recipe = with_settings(Recipe(run_name="tiny"), seed=seed, data=text, **SETTINGS)
        directory = RunDirectory(folder)
        train_module.train_recipe(recipe, directory)
        return directory

    return train


@pytest.fixture(scope="module")
def healthy(train, tmp_path_factory):
    """A run of each seed."""
    root = tmp_path_factory.mktemp("healthy")
    return {seed: train(seed, root / str(seed)) for seed in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def band(healthy, repository):
    """Recorded from healthy runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        bands = importlib.import_module("bands")
    return bands.build_band("tiny", [bands.read(directory) for directory in healthy.values()])


@pytest.fixture
def patch_reference(band, monkeypatch):
    """Let runs find the band while they train."""
    monkeypatch.setattr(log, "find_band", lambda settings, text: find_band(settings, text, [band]))


def compare(directory, band):
    columns, evaluations = columns_of(directory.read_metrics()), directory.read_events("evaluations")
    return compare_with_band(band, columns, evaluations, flatten(read_recipe_of(directory.path)))


def test_healthy_run_with_another_seed_is_on_track(train, band, tmp_path):
    verdict = compare(train(11, tmp_path / "run"), band)
    assert verdict.is_on_track, verdict.sentences()
    assert verdict.differences == ()


def test_reference_does_not_change_a_run(train, healthy, tmp_path, patch_reference, capsys):
    directory = train(1, tmp_path / "run")
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


def scaled_rate(right, factor):
    """The schedule returns another multiple of the peak."""
    return lambda *given: factor * right(*given)


def constant_schedule(_right):
    """After warm-up the rate stays."""
    return lambda position, length, config: min(1.0, (position + 1) / config.warmup_steps)


def constant_applied_rate(right):
    """The optimizer's rate is not the one that is logged."""
    return lambda *given: right(*given[:-1], 8e-3)


def without_residual_scale(right):
    def draw(config, seed):
        for name, weight in right(config, seed):
            yield name, weight * math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else weight

    return draw


def torch_embeddings(right):
    """N(0, 1), as torch initialises them."""

    def draw(*given):
        for name, weight in right(*given):
            yield name, torch.randn_like(weight) if name in {"wte.weight", "wpe.weight"} else weight

    return draw


def dropout_on(right):
    """Whatever the recipe says."""
    return lambda x, _p, training: right(x, 0.2, training)


def exploding_gradients(right):
    """Now and then a kernel overflows, and nothing is clipped."""
    calls = itertools.count(1)

    def clip(parameters, _limit):
        if next(calls) % 30 == 0:
            for parameter in parameters:
                parameter.grad.add_(torch.randn_like(parameter.grad), alpha=100.0)
        return right(parameters, None)

    return clip


def scaled_loss(_right, factor):
    """The loss is scaled for the backward pass, and the gradients are not scaled back."""
    return lambda scaler, loss: factor * loss


def data_repeating(right):
    """The row number wraps around too early."""
    return lambda stream, first, rows: right(stream, first % 32, rows)


def tokens_shuffled(right):
    """A row's tokens come in any order."""

    def batch(stream, first_row, rows):
        found = right(stream, first_row, rows)
        tokens = torch.cat([found.ids, found.targets[:, -1:]], dim=1)
        order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(first_row))
        return Batch(tokens[:, order[:-1]], tokens[:, order[1:]])

    return batch


def decay_on_everything(right):
    def build(*given):
        optimizer = right(*given)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        return optimizer

    return build


def no_causal_mask(right):
    """Attention looks both ways."""
    return lambda *given, **named: right(*given, **named | {"is_causal": False})


RATE, APPLIED = (schedule, "learning_rate_multiplier"), (step_module, "step_if")
WEIGHTS, BATCH = (setup, "init_weights"), (TokenStream, "batch")
FACTOR, SCHEDULE = "the learning rate is off by a factor", "the learning-rate schedule is off"
SCALED = (torch.amp.GradScaler, "scale")
SUMMED = "gradients are summed over micro-batches, not averaged"
MISTAKES = (
    (RATE, constant_schedule, SCHEDULE),
    (APPLIED, constant_applied_rate, SCHEDULE),
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
def test_mistake_in_the_code_is_diagnosed(train, band, tmp_path, monkeypatch, place, replace, name):
    monkeypatch.setattr(*place, replace(getattr(*place)))
    verdict = compare(train(21, tmp_path / "run"), band)
    assert next(iter(verdict.causes), None) == name, verdict.sentences()


def test_run_that_leaves_its_reference_prints_a_line_when_that_changes(
    train, tmp_path, monkeypatch, patch_reference, capsys
):
    monkeypatch.setattr(TokenStream, "batch", tokens_shuffled(TokenStream.batch))
    directory = train(21, tmp_path / "run")
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if "its reference" in line]
    briefs = [(line["on_track"], line["likely_mistake"]) for line in directory.read_events("evaluations")]
    mistake = "tokens are shuffled within rows"
    assert briefs[0] == ("within", None)
    assert len(lines) == sum(now != then for then, now in itertools.pairwise(briefs)) > 0
    assert lines[-1].startswith("above its reference (tiny, 4 recorded runs): ")
    assert mistake in lines[-1]
    status = describe_run(directory.path)
    assert (status.on_track, status.likely_mistake) == ("above", mistake)
