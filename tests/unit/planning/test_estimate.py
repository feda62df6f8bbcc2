from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overnight.data import DataConfig
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import PRESETS, ModelConfig
from overnight.planning.estimate import (
    BYTES_PER_METRICS_LINE,
    StepCost,
    TokenCounts,
    checkpoint_bytes,
    count_run,
    find_token_counts,
    model_config_of,
    predict_cost,
    predict_disk,
    predict_seconds,
)
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, SamplesConfig, load_recipe
from overnight.run_directory import RunDirectory
from overnight.training import OptimizerConfig
from overnight.training.batch import BatchConfig, constant_plan, plan_batches
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.schedule import ScheduleConfig
from overnight.training.state import TrainState
from overnight.training.step import StepResult, every

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=128, context_length=16, vocab_size=500)


def recipe(steps: int, every_steps: int | None = 5) -> Recipe:
    return Recipe(
        run_name="small",
        model=SIZES,
        schedule=ScheduleConfig(total_steps=steps),
        batch=BatchConfig(tokens_per_step=64),
        evaluation=EvaluationConfig(evaluate_every_steps=every_steps, evaluation_tokens=100),
        samples=SamplesConfig(sample_every_steps=every_steps, sample_prompts=("a", "b"), sample_tokens=7),
        checkpoints=CheckpointsConfig(checkpoint_every_steps=every_steps, keep_checkpoints=2),
    )


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 23])
@pytest.mark.parametrize("every_steps", [None, 1, 5, 100])
def test_periodic_work_is_counted_as_the_loop_does_it(steps: int, every_steps: int | None) -> None:
    done: list[int] = []
    hook = every(every_steps, lambda: done.append(1), steps)
    for step in range(1, steps + 1):
        hook(StepResult(step, 0.0, 0.0, 0.0, 0, 0.0))
    work = count_run(recipe(steps, every_steps), constant_plan(16, 2, 2), validation_tokens=1000)
    at_start = 1 if done else 0
    assert work.evaluations == len(done) + at_start
    assert work.evaluated_tokens == 100 * work.evaluations
    assert work.sampled_tokens == 2 * 7 * len(done)
    assert work.checkpoints == max(1, len(done))
    assert (work.tokens, work.micro_batches) == (64 * steps, 2 * steps)


def test_an_evaluation_judges_no_more_than_there_is() -> None:
    """The first token of a split has nothing before it, and is not judged."""
    work = count_run(recipe(5), constant_plan(16, 4), validation_tokens=51)
    assert work.evaluated_tokens == 50 * work.evaluations
    whole = replace(recipe(5), evaluation=EvaluationConfig(evaluate_every_steps=5))
    assert count_run(whole, constant_plan(16, 4), validation_tokens=51).evaluated_tokens == 100
    assert count_run(whole, constant_plan(16, 4), validation_tokens=None).evaluated_tokens is None


def test_a_ramp_has_fewer_micro_batches_than_full_steps_would_have() -> None:
    ramped = BatchConfig(tokens_per_step=64, batch_ramp_start_tokens=16, batch_ramp_tokens=160)
    plan = plan_batches(ramped, 16, 1)
    work = count_run(replace(recipe(30), batch=ramped), plan, None)
    assert work.micro_batches == sum(plan.micro_batches(step) for step in range(30)) < 30 * 4
    assert work.tokens == 16 * work.micro_batches


def test_the_time_is_the_sum_of_its_parts() -> None:
    work = count_run(recipe(10), constant_plan(16, 2, 2), 1000)
    pace = StepCost(
        micro_batch=3.0, update=0.5, start=7.0, evaluated_token=0.01, sampled_token=0.1, saved_byte=1e-6
    )
    assert pace.step(2) == 6.5
    assert predict_seconds(work, pace) == {
        "training": 10 * 6.5,
        "evaluation": pytest.approx(3 * 100 * 0.01),
        "samples": pytest.approx(2 * 14 * 0.1),
        "checkpoints": pytest.approx(2 * work.checkpoint_bytes * 1e-6),
        "compilation": 7.0,
    }


def test_the_cost_of_a_run_and_of_a_billion_tokens() -> None:
    cost = predict_cost(seconds=2 * 3600, tokens=500_000_000, dollars_per_hour=3.0)
    assert cost.run == 6.0
    assert cost.billion_tokens == 12.0


# ---------------------------------------------------------------- on the disk


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one, of SIZES, after a step."""
    model = GPT(SIZES)
    initialize(model, 0)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    state.optimizer.step()
    state.step = 1
    return save_checkpoint(state, tmp_path_factory.mktemp("run") / "checkpoints")


def test_a_checkpoint_has_the_bytes_that_are_foretold(checkpoint: Path) -> None:
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert checkpoint_bytes(SIZES) == pytest.approx(written, rel=0.01)
    assert checkpoint_bytes(PRESETS["gpt2-124m"]) == pytest.approx(12 * 124_439_808, rel=1e-3)


def test_what_is_kept_and_what_is_being_written_takes_disk() -> None:
    work = count_run(recipe(50), constant_plan(16, 4), 1000)
    prepared = TokenCounts(500, Path("data/x"), 12_345, 1000)
    taken = predict_disk(recipe(50), work, prepared)
    assert taken == {
        "shards": 2 * 12_345,
        "checkpoints": 3 * checkpoint_bytes(SIZES),
        "metrics": 50 * BYTES_PER_METRICS_LINE,
    }
    assert predict_disk(recipe(3), count_run(recipe(3), constant_plan(16, 4), 9), prepared)[
        "checkpoints"
    ] == 2 * checkpoint_bytes(SIZES)
    all_kept = replace(
        recipe(50), checkpoints=CheckpointsConfig(checkpoint_every_steps=5, keep_checkpoints=None)
    )
    assert predict_disk(all_kept, work, prepared)["checkpoints"] == 11 * checkpoint_bytes(SIZES)


@pytest.mark.parametrize("vocab_size, width", [(50_257, 2), (65_536, 2), (65_537, 4)])
def test_tokens_not_prepared_yet_take_what_the_run_reads(vocab_size: int, width: int) -> None:
    work = count_run(recipe(50), constant_plan(16, 4), None)
    assert (
        predict_disk(recipe(50), work, TokenCounts(vocab_size, None, None, None))["shards"] == width * 64 * 50
    )


def test_a_line_of_metrics_is_about_as_long_as_foretold(tmp_path: Path) -> None:
    line = {"step": 19_072, "tokens": 9_999_220_736, "loss": 3.2881584167480469}
    line |= {"learning_rate": 6.0000012345e-05, "grad_norm": 0.28515625, "milliseconds": 1071.318}
    directory = RunDirectory(tmp_path / "run")
    directory.append_metrics({**line, "tokens_per_second": 489385.1, "mfu": 0.4233})
    assert directory.metrics.stat().st_size == pytest.approx(BYTES_PER_METRICS_LINE, rel=0.15)


# ---------------------------------------------------------------- the text, before it is read


@pytest.mark.parametrize("tokenizer, vocab_size", [("gpt2", 50_257), ("bpe-4096", 4096)])
def test_a_vocabulary_is_known_by_its_name(tokenizer: str, vocab_size: int) -> None:
    text = find_token_counts(DataConfig(data="data/nowhere", tokenizer=tokenizer), None)
    assert text == TokenCounts(vocab_size, None, None, None)


def test_of_characters_it_is_known_once_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(
        "\n\n".join(f"Paragraph {number} says little. " * 20 for number in range(300))
    )
    asked = DataConfig(data="notes.txt", tokenizer="characters")
    with pytest.raises(ValueError, match="overnight prepare notes.txt --tokenizer characters"):
        find_token_counts(asked, None)
    assert find_token_counts(asked, 100).vocab_size == 100
    manifest = prepare(PrepareConfig(source="notes.txt", tokenizer="characters", validation_fraction=0.2))
    text = find_token_counts(asked, None)
    assert (text.vocab_size, text.folder) == (manifest.vocab_size, Path("data/notes-characters"))
    assert text.validation_tokens == manifest.tokens("validation")
    assert text.tokens == manifest.tokens("train") + manifest.tokens("validation")
    assert find_token_counts(DataConfig(data="data/notes-characters"), None) == text


def test_a_model_that_is_tuned_has_the_sizes_it_has() -> None:
    tuned = load_recipe("shakespeare-finetune")
    assert model_config_of(tuned, 50_257) == PRESETS["gpt2-124m"]
    medium = replace(tuned, init_from="gpt2-medium", model=replace(tuned.model, dropout=0.1))
    assert model_config_of(medium, 50_257) == replace(PRESETS["gpt2-350m"], dropout=0.1)
    with pytest.raises(ValueError, match="there is no model nothing"):
        model_config_of(replace(tuned, init_from="nothing"), 50_257)
    assert model_config_of(load_recipe("gpt2-124m"), 50_257) == PRESETS["gpt2-124m"]
