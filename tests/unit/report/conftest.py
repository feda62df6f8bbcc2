"""A run directory with everything a run can write: a plausible loss curve, samples that try to break out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
run_name = {name}
seed = 1337

[model]
n_layer = 12
n_head = 12
n_embd = 768
context_length = 1024
vocab_size = 50257
dropout = 0.0

[schedule]
total_steps = {total_steps}
peak_learning_rate = {peak}
warmup_steps = 200

[batch]
tokens_per_step = 524288

[optimizer]
weight_decay = 0.1
max_grad_norm = 1.0

[data]
data = "data/fineweb-edu"

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
    "format_version": 1,
    "overnight_version": "0.1.0",
    "source": "FineWeb-Edu sample-10BT",
    "request": {"source": "fineweb-edu", "tokenizer": "gpt2", "tokens": None},
    "tokenizer": "gpt2",
    "tokenizer_fingerprint": "8fa3c91e" * 8,
    "vocab_size": 50_257,
    "end_of_text": 50_256,
    "documents": 388_000,
    "train": [
        {"name": f"train-0000{n}.bin", "tokens": 100_000_000 + n, "documents": 97_000, "sha256": f"{n}b" * 32}
        for n in range(4)
    ],
    "validation": [
        {"name": "validation-00000.bin", "tokens": 4_000_000, "documents": 990, "sha256": "5c" * 32}
    ],
}

COMPRESSION = {
    "bytes": 4_718_592,
    "bits_per_byte": {"gzip": 3.021, "bz2": 2.441, "xz": 2.518, "xz given the training text": 2.203},
}

SAMPLES = (
    ("The moon", " of of the the, and and of\n\n\tthe the"),
    ("The moon", " is the first thing that the people of the world <script>alert('out')</script> & so on."),
    ("Once upon a time", " 月が出た。Ça alors! \u202eright to left\u202c 🌙 \x00\x1b[31m \ud800 \u2028 end"),
    ("def f(x):", "\n    return x < 1 and x > 0 or \"quoted\" and 'single'\n" + "    x = x + 1\n" * 4),
    (
        "The moon",
        " rose over the harbour while the last of the boats came in, and nobody on the quay spoke. It had "
        "been a long season. The nets were mended, the salt was weighed, and in the houses above the road "
        "the lamps were lit one after another, the way they always were, by whoever came home first.\n\n"
        + "unbroken"
        * 60,
    ),
)


def loss_at(step: int, noise: random.Random) -> float:
    return 3.05 + 7.9 * math.exp(-step / 45) + 2.6 / (1 + step / 60) ** 0.5 + noise.gauss(0, 0.045)


def metrics_line(step: int, total_steps: int, peak: float, noise: random.Random) -> dict[str, Any]:
    progress = step / total_steps
    warm = min(1.0, step / 200)
    rate = peak * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    milliseconds = 41_000.0 if step == 1 else 462 + abs(noise.gauss(0, 3)) + (180 if step % 250 == 1 else 0)
    return {
        "step": step,
        "tokens": step * 524_288,
        "loss": loss_at(step, noise),
        "learning_rate": rate,
        "grad_norm": 0.28
        + 6 * math.exp(-step / 30)
        + abs(noise.gauss(0, 0.05))
        + (3.1 if step == 1234 else 0),
        "milliseconds": milliseconds,
        "tokens_per_second": 524_288 / milliseconds * 1000,
        "mfu": 0.52 * 462 / milliseconds,
    }


def evaluation_line(step: int, noise: random.Random) -> dict[str, Any]:
    loss = loss_at(step, noise) + 0.04
    return {
        "step": step,
        "tokens": step * 524_288,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 4.5,
        "evaluated_tokens": 1_048_576,
        "evaluated_bytes": 4_718_592,
    }


def write_run(
    path: Path, steps: int = 2000, total_steps: int = 2000, peak: float = 6e-4, seed: int = 1
) -> Path:
    """A complete run directory after `steps` of `total_steps`, with everything a run can write."""
    noise = random.Random(seed)
    path.mkdir(parents=True)
    recipe = RECIPE.format(name=json.dumps(path.name), total_steps=total_steps, peak=peak)
    (path / "recipe.toml").write_text(recipe, encoding="utf-8")
    for name, content in (("environment", ENVIRONMENT), ("data", MANIFEST), ("compression", COMPRESSION)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=2))
    write_lines(
        path / "metrics.jsonl", [metrics_line(n, total_steps, peak, noise) for n in range(1, steps + 1)]
    )
    every = max(1, steps // 10)
    evaluated = range(0, steps + 1, every)
    write_lines(path / "events" / "evaluations.jsonl", [evaluation_line(step, noise) for step in evaluated])
    samples = [
        {
            "step": number * steps // 5,
            "tokens": number * steps // 5 * 524_288,
            "prompt": prompt,
            "completion": text,
        }
        for number, (prompt, text) in enumerate(SAMPLES, start=1)
    ]
    write_lines(path / "events" / "samples.jsonl", samples)
    (path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    return path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("night", steps=..., ...) -> the new run's folder under tmp_path/runs."""
    return lambda name="night", **options: write_run(tmp_path / "runs" / name, **options)
