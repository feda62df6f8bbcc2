"""The finished runs of a campaign as one record: differences, costs, the tokens for an equal loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from overnight.ablation.arms import Arm
from overnight.ablation.campaign import ArmRun, FinalLoss
from overnight.ablation.paired import PairedDifference, compare_pairs
from overnight.ablation.timing import StepTimes
from overnight.report.run_data import is_finite
from overnight.run_directory import finite_values

Curve = Sequence[tuple[int, float]]
"""(tokens, loss in nats per token), in order."""


@dataclass(frozen=True, kw_only=True)
class TriedSettings:
    """One run of the tuning."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    path: str
    final: FinalLoss
    is_chosen: bool


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
    runs: Sequence[ArmRun]
    finals: Sequence[FinalLoss]
    loss: float | None
    """Mean over seeds, nats per token."""
    bits_per_byte: float | None
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
    tuning_seed: int | None
    """None if nothing was tuned."""
    total_tokens: int
    total_steps: int
    tokens_per_step: int
    data: str
    arms: Sequence[ArmResult]
    tried: Sequence[TriedSettings] = ()
    notices: Sequence[str] = field(default=())

    @property
    def compared(self) -> Sequence[ArmResult]:
        """All arms but the baseline."""
        return self.arms[1:]

    @property
    def evaluated_tokens(self) -> int:
        """Held-out tokens of each last evaluation; 0 if there is none."""
        return max((final.evaluated_tokens for arm in self.arms for final in arm.finals), default=0)

    @property
    def failures(self) -> list[str]:
        """One sentence for each run without a final loss."""
        runs = [
            (str(run.directory.path), final)
            for arm in self.arms
            for run, final in zip(arm.runs, arm.finals, strict=True)
        ]
        runs += [(each.path, each.final) for each in self.tried]
        return [f"{path}: {final.failure}" for path, final in runs if final.failure]


def summarize_arm(
    arm: Arm,
    baseline: Arm,
    runs: Sequence[ArmRun],
    finals: Sequence[FinalLoss],
    of_baseline: ArmResult | None,
) -> ArmResult:
    """The result of an arm whose runs are in the order of the seeds, like those of the baseline."""
    sound = [final for final in finals if final.failure is None]
    model = runs[0].resolved.model
    result = ArmResult(
        name=arm.name,
        changes=arm.changes_from(baseline),
        parameters=model.parameter_count(),
        flops_per_token=model.flops_per_token(),
        runs=runs,
        finals=finals,
        loss=statistics.fmean(final.loss for final in sound) if sound else None,
        bits_per_byte=statistics.fmean(final.bits_per_byte for final in sound) if sound else None,
    )
    if of_baseline is None:
        return result
    every = zip(finals, of_baseline.finals, runs, of_baseline.runs, strict=True)
    pairs = [each for each in every if each[0].failure is None and each[1].failure is None]
    if not pairs:
        return result
    return dataclasses.replace(
        result,
        nats_difference=compare_pairs([mine.loss - theirs.loss for mine, theirs, _, _ in pairs]),
        bits_difference=compare_pairs(
            [mine.bits_per_byte - theirs.bits_per_byte for mine, theirs, _, _ in pairs]
        ),
        equal_loss=compare_curves(
            mean_curve([read_curve(run) for _, _, run, _ in pairs]),
            mean_curve([read_curve(run) for _, _, _, run in pairs]),
        ),
    )


def read_curve(run: ArmRun) -> Curve:
    """The evaluations of a run after its first step."""
    lines = run.directory.read_events("evaluations")
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
    baseline_seconds, seconds, ratio = times
    equal = arm.equal_loss
    if equal is not None:
        equal = dataclasses.replace(
            equal,
            seconds=equal.tokens and equal.tokens / tokens_per_step * seconds,
            baseline_seconds=equal.baseline_tokens
            and equal.baseline_tokens / tokens_per_step * baseline_seconds,
        )
    return dataclasses.replace(arm, step_seconds=seconds, step_time_ratio=ratio, equal_loss=equal)


def ablation_to_json(record: AblationRecord) -> dict[str, Any]:
    """Every figure by name; null where it is unknown or not finite."""
    arms = [
        {
            "name": arm.name,
            "changes": {name: {"baseline": old, "arm": new} for name, (old, new) in arm.changes.items()},
            "tuned": arm.runs[0].settings,
            "parameters": arm.parameters,
            "flops_per_token": arm.flops_per_token,
            "step_seconds": arm.step_seconds,
            "step_time_ratio": arm.step_time_ratio,
            "loss": arm.loss,
            "bits_per_byte": arm.bits_per_byte,
            "nats_per_token_difference": arm.nats_difference and dataclasses.asdict(arm.nats_difference),
            "bits_per_byte_difference": arm.bits_difference and dataclasses.asdict(arm.bits_difference),
            "verdict": arm.nats_difference and arm.nats_difference.verdict,
            "equal_loss": arm.equal_loss and dataclasses.asdict(arm.equal_loss),
            "runs": [
                {"seed": run.seed, "path": str(run.directory.path), **dataclasses.asdict(final)}
                for run, final in zip(arm.runs, arm.finals, strict=True)
            ],
        }
        for arm in record.arms
    ]
    tried = [
        {
            "arm": each.arm,
            "seed": each.seed,
            "settings": each.settings,
            "path": each.path,
            **dataclasses.asdict(each.final),
            "chosen": each.is_chosen,
        }
        for each in record.tried
    ]
    names = ("name", "command", "seeds", "tuning_seed", "total_tokens", "total_steps", "tokens_per_step")
    found = {name: getattr(record, name) for name in (*names, "data", "evaluated_tokens")}
    found |= {"baseline": record.arms[0].name, "comparisons": len(record.compared)}
    written: dict[str, Any] = finite_values(
        {**found, "arms": arms, "tried": tried, "notices": record.notices, "failures": record.failures}
    )
    return written
