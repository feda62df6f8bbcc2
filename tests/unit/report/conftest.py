"""A run directory with everything a run can write: a plausible loss curve, samples that try to break out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

TOKENS_PER_STEP = 524_288
RECIPE = """\
run_name = {name}
[model]
n_layer = 12
n_head = 12
n_embd = 768
context_length = 1024
dropout = 0.0
[schedule]
total_steps = {total_steps}
peak_learning_rate = {peak}
[batch]
tokens_per_step = 524288
[samples]
sample_prompts = ["a <b>", "c"]
"""
ENVIRONMENT = {
    "torch": "2.13.0",
    "device_name": "NVIDIA H200",
    "precision": "bfloat16",
    "compiled": True,
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "command": 'overnight train gpt2-124m.toml --run-name="<night> & day"',
    "started_at": "2026-11-20T22:14:03+00:00",
    "parameters": 124_439_808,
}
MANIFEST = {
    "source": "FineWeb-Edu sample-10BT",
    "request": {"source": "fineweb-edu", "tokens": None},
    "tokenizer_fingerprint": "8fa3c91e" * 8,
    "documents": 388_000,
    "train": [
        {"name": f"train-{n}.bin", "tokens": 100_000_000 + n, "sha256": f"{n}b" * 32} for n in range(4)
    ],
    "validation": [{"name": "validation-0.bin", "tokens": 4_000_000, "sha256": "5c" * 32}],
}
COMPRESSION = {
    "bytes": 4_718_592,
    "bits_per_byte": {"gzip": 3.021, "bz2": 2.441, "xz": 2.518, "xz given the training text": 2.203},
}
SAMPLES = (
    ("The moon", " of of the the, and and of\n\n\tthe the"),
    ("The moon", " is the first thing that <script>alert('out')</script> & so on."),
    ("Once upon a time", " 月が出た。Ça alors! \u202eright to left\u202c 🌙 \x00\x1b[31m \ud800 \u2028 end"),
    ("def f(x):", "\n    return x < 1 and x > 0 or \"quoted\" and 'single'\n" + "    x = x + 1\n" * 4),
    ("The moon", " rose over the harbour.\n\n" + "unbroken" * 60),
)


def loss_at(step: int, noise: random.Random) -> float:
    return 3.05 + 7.9 * math.exp(-step / 45) + 2.6 / (1 + step / 60) ** 0.5 + noise.gauss(0, 0.045)


def metrics_line(step: int, total_steps: int, peak: float, noise: random.Random) -> dict[str, Any]:
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / total_steps))
    milliseconds = 41_000.0 if step == 1 else 462 + abs(noise.gauss(0, 3)) + (180 if step % 250 == 1 else 0)
    spike = 3.1 if step == 1234 else 0
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss_at(step, noise),
        "learning_rate": peak * min(1.0, step / 200) * cosine,
        "grad_norm": 0.28 + 6 * math.exp(-step / 30) + abs(noise.gauss(0, 0.05)) + spike,
        "milliseconds": milliseconds,
        "tokens_per_second": TOKENS_PER_STEP / milliseconds * 1000,
        "mfu": 0.52 * 462 / milliseconds,
    }


def evaluation_line(step: int, noise: random.Random) -> dict[str, Any]:
    loss = loss_at(step, noise) + 0.04
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 4.5,
        "evaluated_tokens": 1_048_576,
        "evaluated_bytes": 4_718_592,
        "low": loss - 0.02,
        "high": loss + 0.02,
    }


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("night", steps=2000, ...) -> a run directory under tmp_path/runs."""

    def build(
        name: str = "night", steps: int = 2000, total_steps: int = 2000, peak: float = 6e-4, seed: int = 1
    ) -> Path:
        noise, path = random.Random(seed), tmp_path / "runs" / name
        path.mkdir(parents=True)
        recipe = RECIPE.format(name=json.dumps(path.name), total_steps=total_steps, peak=peak)
        (path / "recipe.toml").write_text(recipe, encoding="utf-8")
        for file, content in (("environment", ENVIRONMENT), ("data", MANIFEST), ("compression", COMPRESSION)):
            (path / f"{file}.json").write_text(json.dumps(content, indent=2))
        metrics = (metrics_line(step, total_steps, peak, noise) for step in range(1, steps + 1))
        write_lines(path / "metrics.jsonl", metrics)
        evaluated = range(0, steps + 1, max(1, steps // 10))
        write_lines(path / "events" / "evaluations.jsonl", (evaluation_line(at, noise) for at in evaluated))
        sampled = [(at * steps // 5, *sample) for at, sample in enumerate(SAMPLES, start=1)]
        samples = (
            {"step": at, "tokens": at * TOKENS_PER_STEP, "prompt": prompt, "completion": text}
            for at, prompt, text in sampled
        )
        write_lines(path / "events" / "samples.jsonl", samples)
        (path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
        return path

    return build
