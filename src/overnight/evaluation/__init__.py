"""Evaluation: held-out loss, tasks with confidence intervals, comparison with another model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Positional

from overnight.renamed import Renamed


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on prepared text and on tasks."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    data: str | None = None
    """A folder that `overnight prepare` wrote; the run's own if left out."""
    evaluation_tokens: int | None = None
    """Number of validation tokens; all if left out."""
    stride: int | None = None
    """New tokens of each window over a text; if left out a whole context, without overlap."""
    tasks: tuple[str, ...] = ("validation",)
    """validation; hellaswag, hellaswag-lm-eval, arc-easy, arc-challenge, openbookqa, piqa, boolq, copa,
    winogrande, cbt-common-nouns, cbt-named-entities; lambada, lambada-plain; wikitext-2,
    wikitext-2-validation, wikitext-103, ptb, enwik8, text8; lm-eval:NAME for a task of lm-evaluation-harness.
    Separated by spaces or commas."""
    examples: int | None = None
    """Use only the first examples of each task (thousands of characters of a text); all if left out."""
    task_files: str | None = None
    """A folder with the tasks' official files; they are downloaded once if left out."""
    baseline: str | None = None
    """Another model, evaluated on the same examples."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products, the same for every model; bf16 and fp16 are faster on most GPUs."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    processes: int | Literal["auto"] | None = None
    """Number of processes on this machine; auto: one for each GPU. One if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Renamed(names={"against": "baseline"})

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if all are valid."""
        names = ("evaluation_tokens", "stride", "examples")
        counts = {name: getattr(self, name) for name in names}
        return [
            f"--{name.replace('_', '-')}={count} must be at least 1, or left out"
            for name, count in counts.items()
            if count is not None and count < 1
        ]
