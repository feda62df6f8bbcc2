"""A run whose steps grow: stopped in its ramp, or in other micro-batches, it reads the same rows."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from itertools import accumulate

import pytest

from overnight.data.loader import TokenStream
from overnight.recipe import with_settings
from overnight.run import log, setup
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.training.batch import BatchConfig, constant_plan
from overnight.training.schedule import ScheduleConfig

RAMP = BatchConfig(
    tokens_per_step=32 * 32, batch_ramp_start_tokens=8 * 32, batch_ramp_tokens=3072, micro_batch_size=4
)
ROWS_OF_STEPS = [8, 8, 8, 8, 16, 16, 24, 24, 32, 32]  # 1,024 tokens or more in each of the smaller sizes


@pytest.fixture(scope="module")
def ramped(recipe):
    """Ten steps of growing size, with dropout, that end past the ramp."""
    schedule = ScheduleConfig(total_tokens=32 * sum(ROWS_OF_STEPS), warmup_steps=2, learning_rate_decay="wsd")
    return recipe(batch=RAMP, schedule=schedule)


@pytest.fixture(scope="module")
def whole(ramped, tmp_path_factory):
    """The run of `ramped` without interruption."""
    directory = RunDirectory(tmp_path_factory.mktemp("ramp") / "full")
    train_recipe(ramped, directory)
    return directory


@pytest.mark.parametrize("stop", [3, 4, 5, 8])
def test_run_stopped_in_its_ramp_equals_the_whole_run(ramped, whole, fingerprint, train_to, stop):
    """Stops within a size, between two, within the next, and at the ramp's end."""
    assert fingerprint(train_to(ramped, "run", stop)) == fingerprint(whole)


def test_comparison_detects_a_resumed_run_without_ramp(ramped, whole, fingerprint, train_to, monkeypatch):
    """The negative control of the test above."""
    plan_batches, plans = setup.plan_batches, []

    def without_ramp_when_resumed(*given):
        plans.append(plan_batches(*given) if not plans else constant_plan(32, 4, 8))
        return plans[-1]

    monkeypatch.setattr(setup, "plan_batches", without_ramp_when_resumed)
    assert fingerprint(train_to(ramped, "run", 5)) != fingerprint(whole)
    assert len(plans) == 2


def test_metrics_and_events_count_the_tokens_of_a_ramp(whole):
    seen = [32 * rows for rows in accumulate(ROWS_OF_STEPS)]
    assert [line["tokens"] for line in whole.read_metrics()] == seen
    events = whole.read_events("evaluations") + whole.read_events("samples")
    assert len(events) > 4
    assert all(event["tokens"] == [0, *seen][event["step"]] for event in events)


def test_learning_rate_of_a_ramp_follows_the_tokens(whole):
    """2 full steps of 32 rows to the peak, and the last 2 of the run's 5.5 from there to a tenth."""
    rates = [line["learning_rate"] / 1e-2 for line in whole.read_metrics()]
    full_steps = [Fraction(rows, 32) for rows in accumulate(ROWS_OF_STEPS)]
    warm_up, falling = full_steps[:6], full_steps[8:]
    assert rates[:6] == pytest.approx([float(seen / 2) for seen in warm_up])
    assert rates[6:8] == [1.0, 1.0]
    left = [float((Fraction("5.5") - (seen - 1)) / 2) for seen in falling]
    assert rates[8:] == pytest.approx([0.1 + 0.9 * min(1.0, share) for share in left])


def test_progress_bar_of_a_ramp_counts_tokens(ramped, train_to, monkeypatch):
    bars = []

    @contextlib.contextmanager
    def bar(title, total):
        bars.append([total])
        yield lambda amount, note: bars[-1].extend([amount] if amount else [])

    monkeypatch.setattr(log, "progress", bar)
    train_to(ramped, "run", 5)
    expected = [32 * rows for rows in ROWS_OF_STEPS[5:]]
    assert bars[-1] == [sum(expected), *expected]


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_run_resumed_in_other_micro_batches_reads_the_same_rows(
    ramped, metrics_of, train_until, train_to, resume, monkeypatch, micro_batch_size
):
    ramped = with_settings(ramped, dropout=0.0)  # whose noise belongs to the micro-batch
    read: list[int] = []
    batch = TokenStream.batch

    def noted(self, first_row, rows):
        read.extend(range(first_row, first_row + rows))
        return batch(self, first_row, rows)

    monkeypatch.setattr(TokenStream, "batch", noted)
    full = train_to(ramped, "full")
    assert read == list(range(sum(ROWS_OF_STEPS)))
    read.clear()
    directory = train_until(5, ramped, "run")
    resume(directory, micro_batch_size=micro_batch_size)
    assert read == list(range(sum(ROWS_OF_STEPS)))
    for one, other in zip(metrics_of(full), metrics_of(directory), strict=True):
        assert other.pop("loss") == pytest.approx(one.pop("loss"), abs=1e-5)
        assert other.pop("grad_norm") == pytest.approx(one.pop("grad_norm"), rel=1e-3)
        assert other == one


def test_warmup_longer_than_the_full_steps_is_refused(ramped, refusal, tmp_path):
    message = refusal(with_settings(ramped, warmup_steps=6), tmp_path / "run")
    assert [word for word in ("warmup_steps=6", "5.5") if word not in message] == []
