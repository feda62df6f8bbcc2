"""The finished runs of a campaign as one record: differences, costs, the tokens for an equal loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.ablation.paired import PairedDifference, compare_pairs
from overnight.ablation.timing import StepTimes
from overnight.model.model_config import ModelConfig
from overnight.report.run_data import is_finite
from overnight.run_directory import RunDirectory, finite_values

Curve = Sequence[tuple[int, float]]
"""(tokens, loss in nats per token), in order."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The last evaluation of a run, or why there is none."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    """The tuned settings; {} if the arm is not tuned."""
    path: str
    loss: float = math.nan
    """Nats per token."""
    bits_per_byte: float = math.nan
    evaluated_tokens: int = 0
    failure: str | None = None
    is_chosen: bool = False
    """Of a run that tunes: its settings are those of the compared runs."""


@dataclass(frozen=True, kw_only=True)
class EqualLoss:
    """When each arm reaches the final loss of the other one, on its own mean curve of evaluations."""

    tokens: float | None
    """Tokens after which the arm has the baseline's final loss; None: not reached."""
    baseline_tokens: float | None
    """Tokens after which the baseline has the arm's final loss; None: not reached."""
    seconds: float | None = None
    """The time of the arm's steps for `tokens`; None without measured steps."""
    baseline_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's runs, and its comparison with the baseline; what is compared is None for the baseline."""

    name: str
    changes: Mapping[str, tuple[object, object]]
    """The settings that differ from the baseline's, tuned ones included: theirs and the arm's."""
    parameters: int
    flops_per_token: int
    runs: Sequence[RunResult]
    """In the order of the seeds."""
    loss: float | None
    """Mean over seeds, nats per token."""
    nats_difference: PairedDifference | None = None
    """In nats per token, over the seeds of which both runs have a final loss."""
    bits_difference: PairedDifference | None = None
    """In bits per byte."""
    step_seconds: float | None = None
    step_time_ratio: float | None = None
    """The time of a step by the baseline's."""
    equal_loss: EqualLoss | None = None
    """None without evaluations during the runs."""


@dataclass(frozen=True, kw_only=True)
class AblationRecord:
    """A campaign with its results. The baseline is the first arm."""

    name: str
    command: str
    seeds: Sequence[int]
    total_tokens: int
    total_steps: int
    tokens_per_step: int
    data: str
    arms: Sequence[ArmResult]
    tried: Sequence[RunResult] = ()
    """The runs that tuned."""
    notices: Sequence[str] = ()

    @property
    def compared(self) -> Sequence[ArmResult]:
        """All arms but the baseline."""
        return self.arms[1:]

    @property
    def runs(self) -> list[RunResult]:
        """Every run."""
        return [*(run for arm in self.arms for run in arm.runs), *self.tried]

    @property
    def failures(self) -> list[str]:
        """One sentence for each run without a final loss."""
        return [f"{run.path}: {run.failure}" for run in self.runs if run.failure]

    def to_json(self) -> dict[str, Any]:
        """Every figure by name; null where it is unknown or not finite."""
        counts = {"comparisons": len(self.compared), "failures": self.failures}
        found: dict[str, Any] = finite_values(dataclasses.asdict(self) | counts)
        return found


def summarize_arm(
    name: str,
    changes: Mapping[str, tuple[object, object]],
    model: ModelConfig,
    runs: Sequence[RunResult],
    baseline: Sequence[RunResult] | None,
) -> ArmResult:
    """The result of an arm, compared with the runs of the baseline of the same seeds, in the same order."""
    losses = [run.loss for run in runs if run.failure is None]
    result = ArmResult(
        name=name,
        changes=changes,
        parameters=model.parameter_count(),
        flops_per_token=model.flops_per_token(),
        runs=runs,
        loss=statistics.fmean(losses) if losses else None,
    )
    every = zip(runs, baseline or runs, strict=True)
    pairs = [(mine, theirs) for mine, theirs in every if not (mine.failure or theirs.failure)]
    if not pairs or baseline is None:
        return result
    return dataclasses.replace(
        result,
        nats_difference=compare_pairs([mine.loss - theirs.loss for mine, theirs in pairs]),
        bits_difference=compare_pairs([mine.bits_per_byte - theirs.bits_per_byte for mine, theirs in pairs]),
        equal_loss=compare_curves(
            *(mean_curve([*map(read_curve, side)]) for side in zip(*pairs, strict=True))
        ),
    )


def read_curve(run: RunResult) -> Curve:
    """The evaluations of a run after its first step."""
    lines = RunDirectory(Path(run.path)).read_events("evaluations")
    return [(line["tokens"], line["loss"]) for line in lines if line["step"] and is_finite(line["loss"])]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean loss wherever all curves have a point."""
    by_tokens = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in by_tokens)))
    return [(tokens, statistics.fmean(curve[tokens] for curve in by_tokens)) for tokens in common]


def compare_curves(curve: Curve, baseline: Curve) -> EqualLoss | None:
    """Where each curve reaches the other's last loss; None unless both have points before the last."""
    if len(curve) < 2 or len(baseline) < 2:
        return None
    return EqualLoss(
        tokens=tokens_to_reach(curve, baseline[-1][1]),
        baseline_tokens=tokens_to_reach(baseline, curve[-1][1]),
    )


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Tokens at which a curve first has this loss, interpolated linearly; None if it does not reach it.

    A curve that begins below it has it at its first point at the latest.
    """
    before: tuple[float, float] = (curve[0][0], math.inf)
    for tokens, value in curve:
        if value <= loss:
            share = 1.0 if math.isinf(before[1]) else (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def with_times(arm: ArmResult, times: StepTimes, tokens_per_step: int) -> ArmResult:
    """`arm` with the times of its steps, and of the tokens for an equal loss."""
    equal = arm.equal_loss
    if equal is not None:
        steps = [tokens and tokens / tokens_per_step for tokens in (equal.tokens, equal.baseline_tokens)]
        equal = dataclasses.replace(
            equal,
            seconds=steps[0] and steps[0] * times.seconds,
            baseline_seconds=steps[1] and steps[1] * times.baseline_seconds,
        )
    return dataclasses.replace(arm, step_seconds=times.seconds, step_time_ratio=times.ratio, equal_loss=equal)
