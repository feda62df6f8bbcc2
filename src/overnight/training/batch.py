"""Batch arithmetic: the tokens of each step, divided into rows and micro-batches. Needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

ROWS_AT_MOST = 64  # of a micro-batch: more rows gain no speed on a GPU of 2025
CPU_TOKENS_AT_MOST = 4096  # of a micro-batch on a CPU: more tokens gain no speed and take memory


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """`tokens_per_step` and its ramp decide the result; `micro_batch_size` depends on the machine."""

    tokens_per_step: int = 524_288
    """Tokens of one optimizer step: 512 rows of 1,024 (GPT-2 paper, section 2.3)."""
    micro_batch_size: int | None = None
    """Rows of one forward and backward pass; what fits into the device's memory if left out."""
    batch_ramp_start_tokens: int | None = None
    """Let the step grow from this number of tokens, in equal increments, to tokens_per_step (GPT-3 paper,
    appendix B)."""
    batch_ramp_tokens: int | None = None
    """Tokens seen when the step reaches tokens_per_step; each smaller size takes an equal share of them."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = [
            f"{name}={value} must be at least 1"
            for name, value in vars(self).items()
            if value is not None and value < 1
        ]
        if (self.batch_ramp_start_tokens is None) != (self.batch_ramp_tokens is None):
            found.append("give both of batch_ramp_start_tokens and batch_ramp_tokens, or neither")
        return found or self._contradictions()

    def _contradictions(self) -> list[str]:
        """Contradictions between values that are valid by themselves."""
        first, full = self.batch_ramp_start_tokens, self.tokens_per_step
        if first is None:
            return []
        if first >= full:
            return [f"batch_ramp_start_tokens={first} must be less than tokens_per_step={full}"]
        if full % first:
            multiples = [count * first for count in (full // first, full // first + 1) if count > 1]
            return [
                f"tokens_per_step={full} is not a multiple of batch_ramp_start_tokens={first}, as "
                f"{' and '.join(map(str, multiples))} would be"
            ]
        return []


class Stage(NamedTuple):
    """Consecutive steps of one size."""

    first_step: int
    first_micro_batch: int
    """Number of micro-batches in all steps before it."""
    micro_batches: int
    """Micro-batches of each of its steps."""


@dataclass(frozen=True)
class BatchPlan:
    """Tokens of a step = micro_batches(step) x micro_batch_size x tokens_per_row.

    Every micro-batch has the same shape and takes the rows after those of the micro-batch before it. Rows
    are numbered from the start of the run.
    """

    tokens_per_row: int
    micro_batch_size: int
    stages: tuple[Stage, ...]
    """Stages from step 0 on, the last one unbounded; a single one if every step has the same size."""

    def micro_batches(self, step: int) -> int:
        """Number of micro-batches of the step."""
        return self._stage(step).micro_batches

    def tokens(self, step: int) -> int:
        """Number of tokens of the step."""
        return self.micro_batches(step) * self._tokens_per_micro_batch

    def share(self, step: int, rank: int, size: int) -> range:
        """The micro-batches of the step that process `rank` of `size` computes: consecutive, equally many."""
        count = self.micro_batches(step) // size
        assert count * size == self.micro_batches(step), (step, size)
        return range(rank * count, (rank + 1) * count)

    def next_row(self, first_row: int, rank: int, size: int) -> int:
        """The first row that `rank` computes after the micro-batch at `first_row`: for prefetching."""
        number = first_row // self.micro_batch_size
        index = bisect_right(self.stages, number, key=lambda stage: stage.first_micro_batch) - 1
        stage = self.stages[index]
        steps, within = divmod(number - stage.first_micro_batch, stage.micro_batches)
        step = stage.first_step + steps
        if within + 1 in self.share(step, rank, size):
            return first_row + self.micro_batch_size
        return self.rows(step + 1, self.share(step + 1, rank, size)[0])[0]

    def rows(self, step: int, micro_batch: int) -> tuple[int, int]:
        """(first row, number of rows) of one micro-batch."""
        return (self._before(step) + micro_batch) * self.micro_batch_size, self.micro_batch_size

    def tokens_before(self, step: int) -> int:
        """Number of tokens of all steps before `step`."""
        return self._before(step) * self._tokens_per_micro_batch

    def full_steps_before(self, step: int) -> float:
        """All steps before `step`, in full steps: a smaller one counts as its share of a full one."""
        return self._before(step) / self.stages[-1].micro_batches

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that have at least `tokens` tokens together."""
        wanted = -(-tokens // self._tokens_per_micro_batch)  # micro-batches, rounded up
        index = bisect_right(self.stages, wanted, key=lambda stage: stage.first_micro_batch)
        stage = self.stages[index - 1]
        # Floor division of a negative number rounds up: the last step may exceed the need.
        return stage.first_step - (stage.first_micro_batch - wanted) // stage.micro_batches

    @property
    def _tokens_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.tokens_per_row

    def _before(self, step: int) -> int:
        """Number of micro-batches of all steps before `step`."""
        stage = self._stage(step)
        return stage.first_micro_batch + (step - stage.first_step) * stage.micro_batches

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]


def constant_plan(tokens_per_row: int, micro_batch_size: int, micro_batches: int = 1) -> BatchPlan:
    """A plan whose steps all have `micro_batches` micro-batches."""
    return BatchPlan(tokens_per_row, micro_batch_size, (Stage(0, 0, micro_batches),))


def plan_batches(
    config: BatchConfig, tokens_per_row: int, rows_that_fit: int, processes: int = 1
) -> BatchPlan:
    """Divide the steps; where the config leaves it open, a micro-batch has at most `rows_that_fit` rows.

    Every process computes the same number of micro-batches. Raises ValueError, with values that work, where
    something does not divide.
    """
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    smallest, rows = _smallest_step(config, tokens_per_row)
    if rows % processes:
        above = -(-rows // processes) * processes
        fewer = max(count for count in _divisors(rows) if count <= processes)
        fitting = [count * tokens_per_row for count in (above - processes, above) if count]
        raise ValueError(
            f"the {rows} rows of {smallest}={rows * tokens_per_row} can't be divided among {processes} "
            f"processes; {' and '.join(map(str, fitting))} can, or start {fewer}"
        )
    of_process = rows // processes
    at_once = config.micro_batch_size
    if at_once is None:
        at_once = max(count for count in _divisors(of_process) if count <= max(1, rows_that_fit))
    if of_process % at_once:
        whose = f"the {of_process} rows of each process" if processes > 1 else f"the {rows} rows"
        raise ValueError(
            f"micro_batch_size={at_once} does not divide {whose} of {smallest}="
            f"{rows * tokens_per_row}; these do: {', '.join(map(str, _divisors(of_process)))}"
        )
    return BatchPlan(tokens_per_row, at_once, _stages(config, rows // at_once))


def _smallest_step(config: BatchConfig, tokens_per_row: int) -> tuple[str, int]:
    """(the setting that decides the size of the smallest step, the rows of that step)."""
    rows, left = divmod(config.tokens_per_step, tokens_per_row)
    if left:
        nearest = max(1, round(config.tokens_per_step / tokens_per_row)) * tokens_per_row
        raise ValueError(
            f"tokens_per_step={config.tokens_per_step} is not a whole number of rows of "
            f"context_length={tokens_per_row}; {nearest} is"
        )
    first = config.batch_ramp_start_tokens
    if first is None:
        return "tokens_per_step", rows
    if first % tokens_per_row:
        smaller = [count * tokens_per_row for count in _divisors(rows)[:-1] or [1]]
        raise ValueError(
            f"batch_ramp_start_tokens={first} is not a whole number of rows of "
            f"context_length={tokens_per_row}; {min(smaller, key=lambda tokens: abs(tokens - first))} is"
        )
    return "batch_ramp_start_tokens", first // tokens_per_row


def _divisors(number: int) -> list[int]:
    return [count for count in range(1, number + 1) if number % count == 0]


def _stages(config: BatchConfig, micro_batches: int) -> tuple[Stage, ...]:
    """The ramp and the constant size after it; `micro_batches` are those of its unit, the smallest size.

    The ramp's tokens are cut into equal shares, one for each size below the full one. A step has one unit,
    and one more for each share that was seen completely before it. A stage that exceeds its share, since its
    steps are whole, shortens the next one, so that no error accumulates.
    """
    unit, ramp_tokens = (
        config.batch_ramp_start_tokens or config.tokens_per_step,
        config.batch_ramp_tokens or 0,
    )
    shares = config.tokens_per_step // unit - 1
    stages, step, units = [], 0, 0
    for size in range(1, shares + 1):
        missing = size * ramp_tokens - shares * units * unit  # both times `shares`, to stay whole
        steps = max(0, -(-missing // (shares * size * unit)))
        if steps:
            stages.append(Stage(step, units * micro_batches, size * micro_batches))
        step, units = step + steps, units + steps * size
    return (*stages, Stage(step, units * micro_batches, (shares + 1) * micro_batches))
