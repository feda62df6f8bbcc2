"""Batch arithmetic: how one step's tokens are divided into rows and micro-batches. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from overnight.model.config import ModelConfig

ROWS_AT_MOST = 64
CPU_TOKENS_AT_ONCE = 4096  # larger micro-batches bring a CPU nothing and cost it memory


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """`tokens_per_step` is science; `rows_per_micro_batch` is what the machine holds at once."""

    tokens_per_step: int = 524_288
    """Tokens of one optimizer step: 512 rows of 1,024 (GPT-2 paper, section 2.3)."""
    rows_per_micro_batch: int | None = None
    """Rows of one forward and backward pass; found from the device's memory if left out."""


@dataclass(frozen=True)
class BatchPlan:
    """tokens_per_step = micro_batches x rows_per_micro_batch x tokens_per_row."""

    tokens_per_row: int
    rows_per_micro_batch: int
    micro_batches: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.micro_batches * self.rows_per_micro_batch * self.tokens_per_row

    def rows(self, step: int, micro_batch: int) -> tuple[int, int]:
        """(first row, number of rows) of one micro-batch; rows are numbered from the start of the run."""
        first = (step * self.micro_batches + micro_batch) * self.rows_per_micro_batch
        return first, self.rows_per_micro_batch


def plan_batches(config: BatchConfig, tokens_per_row: int, rows_that_fit: int) -> BatchPlan:
    """Divide a step. Raises ValueError, with values that would do, where it does not divide."""
    rows, left = divmod(config.tokens_per_step, tokens_per_row)
    if left or rows < 1:
        nearest = max(1, round(config.tokens_per_step / tokens_per_row)) * tokens_per_row
        raise ValueError(
            f"tokens_per_step={config.tokens_per_step} is not a whole number of rows of "
            f"context_length={tokens_per_row}; {nearest} is"
        )
    divisors = [count for count in range(1, rows + 1) if rows % count == 0]
    at_once = config.rows_per_micro_batch
    if at_once is None:
        at_once = max(count for count in divisors if count <= max(1, rows_that_fit))
    if at_once not in divisors:
        raise ValueError(
            f"rows_per_micro_batch={at_once} does not divide the {rows} rows of tokens_per_step="
            f"{config.tokens_per_step}; these do: {', '.join(map(str, divisors))}"
        )
    return BatchPlan(tokens_per_row, at_once, rows // at_once)


def estimate_rows_that_fit(model: ModelConfig, memory_bytes: int, device: str) -> int:
    """How many rows of the whole context one pass may hold, at most 64: an estimate, on the safe side.

    Weights, gradients and AdamW's moments take 16 bytes a parameter. An activation row takes about
    34 C bytes a layer in 16-bit (Korthikanti et al. 2022, equation 2, attention fused), counted twice
    for float32, and three float32 copies of its logits. 80% of the memory is planned with.
    """
    if device == "cpu":
        return max(1, CPU_TOKENS_AT_ONCE // model.context_length)
    assert model.vocab_size is not None
    per_token = 68 * model.n_layer * model.n_embd + 12 * model.vocab_size
    free = 0.8 * memory_bytes - 16 * model.parameter_count()
    return max(1, min(ROWS_AT_MOST, int(free // (per_token * model.context_length))))
