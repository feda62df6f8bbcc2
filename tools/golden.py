"""The loss curves of three small recipes on a CPU, as they were when committed: what a change may not move.

    python tools/golden.py --write

writes tests/run/golden/*.json anew, for a commit that says why the figures move. Text, weights and noise are
functions of the seeds below.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from overnight.data import DataConfig
from overnight.hardware import find_device_name
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.recipe import Recipe
from overnight.run.train import train_recipe
from overnight.run_directory import RunDirectory
from overnight.terminal import quiet
from overnight.training import ComputeConfig, OptimizerConfig
from overnight.training.batch import BatchConfig
from overnight.training.schedule import ScheduleConfig

FOLDER = Path(__file__).parents[1] / "tests" / "run" / "golden"
STEPS = 20
SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=32)
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"model": SMALL},
    "micro-batches": {
        "model": ModelConfig(n_layer=3, n_head=4, n_embd=32, context_length=32, dropout=0.1),
        "batch": BatchConfig(tokens_per_step=512, micro_batch_size=4),
    },
    "wsd-chunked": {
        "model": SMALL,
        "schedule": ScheduleConfig(total_steps=STEPS, warmup_steps=4, learning_rate_decay="wsd"),
        "compute": ComputeConfig(device="cpu", precision="fp32", compile=False, loss="chunked"),
    },
}


def describe_class() -> dict[str, str]:
    """Machines of one class round alike: the same processor, instructions and torch."""
    return {
        "processor": find_device_name("cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def train(name: str, folder: Path) -> list[float]:
    """The loss of each step, nats per token, of one of RECIPES; with one thread."""
    text = folder / "text"
    if not text.is_dir():
        text.mkdir()
        for number in range(40):
            lines = [f"Line {line} is about {(line * 7 + number) % 100}.\n" for line in range(20)]
            (text / f"{number:02}.txt").write_text("".join(lines))
    shards = folder / "shards"
    prepare_shards(
        PrepareConfig(source=str(text), out=str(shards), tokenizer="characters", validation_fraction=0.2)
    )
    given: dict[str, Any] = {
        "run_name": name,
        "data": DataConfig(data=str(shards)),
        "optimizer": OptimizerConfig(peak_learning_rate=1e-2),
        "schedule": ScheduleConfig(total_steps=STEPS, warmup_steps=3),
        "batch": BatchConfig(tokens_per_step=512, micro_batch_size=16),
        "compute": ComputeConfig(device="cpu", precision="fp32", compile=False),
        **RECIPES[name],
    }
    directory = RunDirectory(folder / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet(True):
            train_recipe(Recipe(**given), directory)
    finally:
        torch.set_num_threads(threads)
    return [line["loss"] for line in directory.read_metrics()]


def main() -> int:
    """Write all curves anew; without --write, say what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            content = {**describe_class(), "losses": train(name, Path(folder))}
        text = json.dumps(content, indent=1) + "\n"
        if options.write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}.json").write_text(text)
        print(f"{name}: {content['losses'][0]:.4f} to {content['losses'][-1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
