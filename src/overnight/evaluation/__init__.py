"""Evaluation of a model: held-out loss, tasks with confidence intervals, comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Positional

from overnight.config import Renamed


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a model is judged on: prepared text, tasks."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    data: str | None = None
    """A folder that `overnight prepare` wrote; the run's own if left out."""
    evaluation_tokens: int | None = None
    """How many validation tokens; all of them if left out."""
    stride: int | None = None
    """Judge a text so many ids at a time, each after the context before it; a context at a time, each
    beginning anew, if left out."""
    tasks: tuple[str, ...] = ("validation",)
    """validation; hellaswag, hellaswag-lm-eval, arc-easy, arc-challenge, openbookqa, piqa, boolq, copa,
    winogrande, cbt-common-nouns, cbt-named-entities; lambada, lambada-plain; wikitext-2,
    wikitext-2-validation, wikitext-103, ptb, enwik8, text8; lm-eval:NAME for a task of lm-evaluation-harness.
    Spaces or commas between."""
    examples: int | None = None
    """The first so many of each task (thousand characters of a text); all if left out."""
    task_files: str | None = None
    """A folder that holds the tasks' official files; fetched once if left out."""
    baseline: str | None = None
    """Another model, judged on the same."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    processes: int | Literal["auto"] | None = None
    """Share the work among so many on this machine; auto: one for each GPU. One by itself if left out."""
    json: bool = False
    """Print one JSON object to standard output."""

    RENAMED: ClassVar[Renamed] = Renamed(names={"against": "baseline"})

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        names = ("evaluation_tokens", "stride", "examples")
        counts = {name: getattr(self, name) for name in names}
        return [
            f"--{name.replace('_', '-')}={count} must be at least 1, or left out"
            for name, count in counts.items()
            if count is not None and count < 1
        ]
