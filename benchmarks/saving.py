"""How long training waits for a checkpoint: until it is on the disk, or until it is copied for a thread.

    python benchmarks/saving.py --repeats 5 --folder .

The state has the size of a GPT-2 with AdamW's moments; each side saves it in turn, into a folder on the disk
that is to be measured. Beside it: how much longer a step takes while the thread writes.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
from overnight.model.model_config import ModelConfig
from overnight.model.presets import PRESETS

HEADINGS = ("training waits", "median ms", "min", "max", "times as short")
FOREGROUND, BACKGROUND = "until it is on the disk", "until it is copied"


def build_state(config: ModelConfig, device: str) -> Any:
    """A model of that size and its optimizer, with moments of noise."""
    import torch

    from overnight.model.gpt import GPT
    from overnight.training import OptimizerConfig
    from overnight.training.optim import build_optimizer
    from overnight.training.state import TrainState

    model = GPT(config, seed=0).to(device)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))
    for parameter in model.parameters():
        moments = {name: torch.randn_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return state


def sides(state: Any, folder: Path) -> dict[str, Callable[[], float]]:
    """Milliseconds that `save` takes, and with `wait`; what a side has written is deleted after it."""
    from overnight.distributed.world import SINGLE_PROCESS
    from overnight.training.checkpoint.save import Saver

    numbers: Iterator[int] = itertools.count()

    def save(*, waits: bool) -> float:
        place = folder / f"run-{next(numbers)}" / "checkpoints"
        saver = Saver(place, SINGLE_PROCESS, lambda _: None, lambda: None, {})

        def begin() -> None:
            saver.save(state)
            if waits:
                saver.wait()

        spent = measure.milliseconds(begin)
        saver.wait()
        shutil.rmtree(place.parent)
        return spent

    return {FOREGROUND: lambda: save(waits=True), BACKGROUND: lambda: save(waits=False)}


def step_beside(state: Any, folder: Path, repeats: int) -> list[tuple[float, float]]:
    """(milliseconds of a forward and backward pass alone, the same while a thread writes), in turn."""
    import torch

    from overnight.distributed.world import SINGLE_PROCESS
    from overnight.training.checkpoint.save import Saver

    config, device = state.model.config, next(state.model.parameters()).device
    ids = torch.randint(config.vocab_size, (1, 128), device=device)

    def step() -> None:
        state.model(ids).logsumexp(-1).mean().backward()
        state.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    found = []
    for number in range(repeats):
        alone = measure.milliseconds(step)
        place = folder / f"beside-{number}" / "checkpoints"
        saver = Saver(place, SINGLE_PROCESS, lambda _: None, lambda: None, {})
        saver.save(state)
        found.append((alone, measure.milliseconds(step)))
        saver.wait()
        shutil.rmtree(place.parent)
    return found


def report(options: argparse.Namespace) -> measure.Report:
    """Save in turn."""
    state = build_state(PRESETS[options.preset], options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure.interleave(sides(state, Path(folder)), options.repeats, warm_ups=1)
        beside = step_beside(state, Path(folder), options.repeats)
    ratio = measure.paired_ratio(found[BACKGROUND], found[FOREGROUND])
    slower = statistics.median(meanwhile / alone for alone, meanwhile in beside)
    size = 12 * state.model.config.parameter_count() / 1e9
    return measure.Report(
        title="How long training waits for a checkpoint",
        headings=HEADINGS,
        rows=[
            [FOREGROUND, *measure.spread(found[FOREGROUND]), "1"],
            [BACKGROUND, *measure.spread(found[BACKGROUND]), f"{ratio:.1f}"],
        ],
        measured={**found, "alone_meanwhile": beside},
        notes=[
            f"{size:.2f} GB; forward and backward of 128 tokens take {slower:.2f} times as long while the "
            "thread writes."
        ],
        settings={"model": options.preset, "device": options.device, "repeats": options.repeats},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=5)
    parser.add_argument("--preset", choices=PRESETS, default="gpt2-124m", help="the size of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the measured disk; a temporary one if left out")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
