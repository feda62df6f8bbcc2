"""Small run directories, as `overnight runs` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
run_name = "{name}"
[schedule]
total_steps = {total_steps}
[model]
context_length = 32
[batch]
tokens_per_step = 64
"""
EVALUATION = {"step": 4, "tokens": 256, "loss": 4.0, "bits_per_byte": 1.5}


@pytest.fixture
def make_run(here: Path) -> Callable[..., Path]:
    """make_run("night", steps=4, written_at=seconds, **evaluation) -> runs/night, relative."""

    def build(
        name: str = "night", steps: int = 4, total_steps: int = 10, written_at: float = 1e9, **facts: Any
    ) -> Path:
        path = Path("runs") / name
        (path / "events").mkdir(parents=True)
        (path / "recipe.toml").write_text(RECIPE.format(name=name, total_steps=total_steps))
        lines = [
            {"step": n, "tokens": 64 * n, "loss": 9.0 / n, "tokens_per_second": 9e4}
            for n in range(1, steps + 1)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(path / "metrics.jsonl", (written_at, written_at))
        (path / "events" / "evaluations.jsonl").write_text(json.dumps(EVALUATION | facts) + "\n")
        (path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
        return path

    return build
