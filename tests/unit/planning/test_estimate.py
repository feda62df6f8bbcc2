from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from overnight.data import DataConfig
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS
from overnight.planning.estimate import (
    BYTES_PER_METRICS_LINE,
    StepCost,
    TokenCounts,
    checkpoint_bytes,
    count_run,
    find_token_counts,
    model_config_of,
    predict_disk,
)
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import CheckpointsConfig, EvaluationConfig, Recipe, Resolved, SamplesConfig, load_recipe
from overnight.training import Compute
from overnight.training.batch import BatchConfig, plan_batches
from overnight.training.schedule import ScheduleConfig

from .conftest import COST, PlanFor

SIZES = ModelConfig(n_layer=2, n_head=2, n_embd=128, context_length=16, vocab_size=500)
COMPUTE = Compute(device="cpu", precision="fp32", compile=False, attention="math", loss="full")


def run_of(steps: int, every_steps: int | None = 5, rows: int = 4, **changes: object) -> Resolved:
    """A run with everything that happens periodically each `every_steps`."""
    recipe = Recipe(
        run_name="small",
        schedule=ScheduleConfig(total_steps=steps),
        batch=BatchConfig(tokens_per_step=64),
        evaluation=EvaluationConfig(evaluate_every_steps=every_steps, evaluation_tokens=100),
        samples=SamplesConfig(sample_every_steps=every_steps, sample_prompts=("a", "b"), sample_tokens=7),
        checkpoints=CheckpointsConfig(checkpoint_every_steps=every_steps, keep_checkpoints=2),
    )
    recipe = replace(recipe, **changes)  # type: ignore[arg-type]
    plan = plan_batches(recipe.batch, 16, rows)
    return Resolved(recipe=recipe, model=SIZES, compute=COMPUTE, plan=plan, total_steps=steps)


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 23])
@pytest.mark.parametrize("every_steps", [None, 1, 5, 100])
def test_periodic_work_is_counted_as_a_run_does_it(steps: int, every_steps: int | None) -> None:
    times = [step for step in range(1, steps + 1) if every_steps and step % every_steps == 0]
    if every_steps and steps not in times:
        times.append(steps)
    counts = count_run(run_of(steps, every_steps, rows=2), validation_tokens=1000)
    assert counts.evaluations == len(times) + (1 if times else 0)
    assert counts.evaluated_tokens == 100 * counts.evaluations
    assert counts.sampled_tokens == 2 * 7 * len(times)
    assert counts.checkpoints == max(1, len(times))
    assert (counts.tokens, counts.micro_batches) == (64 * steps, 2 * steps)


@pytest.mark.parametrize(
    "limit, validation, evaluated", [(100, 51, 100), (None, 51, 100), (30, 51, 60), (None, None, None)]
)
def test_evaluation_has_at_most_the_held_out_tokens(
    limit: int | None, validation: int | None, evaluated: int | None
) -> None:
    """Twice in five steps. The first token of the split has no context and is not evaluated."""
    evaluation = EvaluationConfig(evaluate_every_steps=5, evaluation_tokens=limit)
    assert count_run(run_of(5, evaluation=evaluation), validation).evaluated_tokens == evaluated


def test_batch_ramp_has_fewer_micro_batches() -> None:
    ramped = BatchConfig(tokens_per_step=64, batch_ramp_start_tokens=16, batch_ramp_tokens=160)
    resolved = run_of(30, rows=1, batch=ramped)
    counts = count_run(resolved, None)
    assert counts.micro_batches == sum(resolved.plan.micro_batches(step) for step in range(30)) < 30 * 4
    assert counts.tokens == 16 * counts.micro_batches


def test_time_and_price_are_sums_of_their_parts(plan_for: PlanFor) -> None:
    plan = replace(plan_for("gpt2-124m", "h100", dollars_per_hour=3.0), costs=[COST] * 3)
    counts, found = plan.counts, plan.forecast
    assert found is not None
    assert found.seconds_by_use == {
        "training": counts.micro_batches * COST.micro_batch + counts.steps * COST.update,
        "evaluation": (counts.evaluated_tokens or 0) * COST.evaluated_token,
        "samples": counts.sampled_tokens * COST.sampled_token,
        "checkpoints": counts.checkpoints * counts.checkpoint_bytes * COST.saved_byte,
        "compilation": COST.start,
    }
    assert found.seconds == pytest.approx(sum(found.seconds_by_use.values()))
    assert found.dollars == pytest.approx(3 * found.seconds / 3600)
    assert found.dollars_per_billion_tokens == pytest.approx(found.dollars * 1e9 / counts.tokens)
    step_seconds = plan.micro_batches * COST.micro_batch + COST.update
    assert found.tokens_per_second == pytest.approx(524_288 / step_seconds)
    assert datetime.fromisoformat(str(found.ends_at)) > datetime.now(UTC)


def test_run_that_ends_after_the_calendar_has_no_end(plan_for: PlanFor) -> None:
    found = replace(plan_for("gpt2-124m", "h100"), costs=[StepCost(1e30)] * 3).forecast
    assert found is not None
    assert (found.ends_at, found.dollars) == (None, None)


@pytest.mark.parametrize("steps, keep, checkpoints", [(50, 2, 3), (3, 2, 2), (50, None, 11)])
def test_disk_holds_kept_checkpoints_and_the_one_being_written(
    steps: int, keep: int | None, checkpoints: int
) -> None:
    resolved = run_of(steps, checkpoints=CheckpointsConfig(checkpoint_every_steps=5, keep_checkpoints=keep))
    prepared = TokenCounts(500, "data/x", 12_345, 1000)
    assert predict_disk(resolved.recipe, count_run(resolved, 1000), prepared) == {
        "shards": 2 * 12_345,
        "checkpoints": checkpoints * checkpoint_bytes(SIZES, resolved.recipe.optimizer),
        "metrics": steps * BYTES_PER_METRICS_LINE,
    }


@pytest.mark.parametrize("vocab_size, width", [(50_257, 2), (65_536, 2), (65_537, 4)])
def test_unprepared_text_takes_the_tokens_of_the_run(vocab_size: int, width: int) -> None:
    resolved, text = run_of(50), TokenCounts(vocab_size, None, None, None)
    assert predict_disk(resolved.recipe, count_run(resolved, None), text)["shards"] == width * 64 * 50


def test_vocabulary_is_known_by_the_tokenizer_or_once_prepared(here: Path) -> None:
    for tokenizer, size in (("gpt2", 50_257), ("bpe-4096", 4096)):
        text = find_token_counts(DataConfig(data="data/nowhere", tokenizer=tokenizer), None)
        assert text == TokenCounts(size, None, None, None)
    Path("notes.txt").write_text("\n\n".join(f"Paragraph {each} says little. " * 20 for each in range(300)))
    asked = DataConfig(data="notes.txt", tokenizer="characters", validation_fraction=0.2)
    command = "overnight prepare notes.txt --tokenizer characters --validation-fraction 0.2"
    with pytest.raises(ValueError, match=command):
        find_token_counts(asked, None)
    assert find_token_counts(asked, 100) == TokenCounts(100, None, None, None)
    manifest = prepare_shards(
        PrepareConfig(source="notes.txt", tokenizer="characters", validation_fraction=0.2)
    )
    assert manifest is not None
    trained, held_out = manifest.tokens("train"), manifest.tokens("validation")
    prepared = TokenCounts(manifest.vocab_size, "data/notes-characters", trained + held_out, held_out)
    assert find_token_counts(asked, None) == prepared
    assert find_token_counts(DataConfig(data="data/notes-characters"), None) == prepared
    assert find_token_counts(replace(asked, validation_fraction=0.3), 100).tokens is None
    Path("notes.txt").write_text("Edited. " * 9000)
    assert find_token_counts(asked, 100).tokens is None


def test_model_of_init_from_keeps_its_sizes() -> None:
    tuned = load_recipe("shakespeare-finetune")
    assert model_config_of(tuned, 50_257) == PRESETS["gpt2-124m"]
    medium = replace(tuned, init_from="gpt2-medium", model=replace(tuned.model, dropout=0.1))
    assert model_config_of(medium, 50_257) == replace(PRESETS["gpt2-350m"], dropout=0.1)
    with pytest.raises(ValueError, match="nothing"):
        model_config_of(replace(tuned, init_from="nothing"), 50_257)
    assert model_config_of(load_recipe("gpt2-124m"), 50_257) == PRESETS["gpt2-124m"]
