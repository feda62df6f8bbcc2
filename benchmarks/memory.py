"""How accurate the memory estimate is: beside the peak of a training step, for each part of the model.

    python benchmarks/memory.py
    python benchmarks/memory.py --precisions bf16 --parts rotary experts --compile

A step of two micro-batches is trained twice on the CPU, the second time under torch's profiler, which sees
every tensor. The peak includes weights, gradients and what the optimizer keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import measure
from overnight.bench.worker import Rows
from overnight.distributed.world import World
from overnight.model.gpt import init_weights
from overnight.model.model_config import ModelConfig
from overnight.recipe import Recipe, Resolved
from overnight.run.setup import build_state, build_training
from overnight.training import Compute, OptimizerConfig
from overnight.training.batch import constant_plan
from overnight.training.memory import MemoryEstimate, estimate_memory
from overnight.training.schedule import ScheduleConfig
from overnight.training.step import train_step

HEADINGS = ("part", "precision", "compiled", "estimate, MB", "measured, MB", "estimate / measured")
MODERN: dict[str, Any] = {
    "positions": "rotary",
    "normalization": "rms",
    "norm_gains": False,
    "biases": False,
    "qk_norm": True,
    "activation": "relu2",
    "tied_head": False,
    "embedding_norm": True,
    "zero_projections": True,
    "logit_softcap": 15.0,
}
ROTARY = {"positions": "rotary"}
PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dropout": {"dropout": 0.1},
    "rotary": ROTARY,
    "rms": {"normalization": "rms"},
    "no gains": {"norm_gains": False},
    "rms, no gains": {"normalization": "rms", "norm_gains": False},
    "no biases": {"biases": False},
    "qk norm": {"qk_norm": True},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "untied head": {"tied_head": False},
    "embedding norm": {"embedding_norm": True},
    "soft cap": {"logit_softcap": 15.0},
    "soft cap, chunked loss": {"logit_softcap": 15.0, "loss": "chunked"},
    "embedding shortcut": {"embedding_shortcut": True},
    "value embeddings": {"value_embeddings": "all"},
    "grouped queries": {"n_kv_head": 2},
    "rotary, grouped queries": {**ROTARY, "n_kv_head": 2},
    "latent attention": {**ROTARY, "latent_rank": 64},
    "latent attention, rms": {**ROTARY, "latent_rank": 64, "normalization": "rms"},
    "chunked loss": {"loss": "chunked"},
    "experts": {"n_expert": 8, "shared_experts": 1},
    "swiglu experts": {"n_expert": 8, "activation": "swiglu"},
    "windows": {"window_pattern": "SSL"},
    "muon": {"optimizer": "muon"},
    "muon, row normalization": {"optimizer": "muon", "row_normalization": True},
    "modern": {**MODERN, "optimizer": "muon"},
    "modern, all": {
        **MODERN,
        "optimizer": "muon",
        "embedding_shortcut": True,
        "value_embeddings": "alternate",
    },
}
"""Settings of the model, the optimizer and the step, by what the table calls them."""


class Sizes(NamedTuple):
    """What all parts are measured with."""

    model: ModelConfig
    rows: int
    precision: str
    is_compiled: bool


def split_settings(settings: dict[str, Any], sizes: Sizes) -> tuple[ModelConfig, OptimizerConfig, Compute]:
    """A part's settings in the configurations that they belong to."""

    def of(kind: Any) -> dict[str, Any]:
        return {name: settings[name] for name in settings.keys() & kind.__dataclass_fields__.keys()}

    chosen: Any = {"precision": sizes.precision, "compile": sizes.is_compiled}
    compute = Compute(device="cpu", attention="fused", loss="full", **chosen)
    model = dataclasses.replace(sizes.model, **of(ModelConfig))
    return model, OptimizerConfig(**of(OptimizerConfig)), dataclasses.replace(compute, **of(Compute))


def bytes_at_peak(action: Callable[[], object]) -> int:
    """The most that tensors took while `action` ran, beyond what they took before, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    taken = peak = 0
    for change in (event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"):
        taken += change
        peak = max(peak, taken)
    return peak


def measure_part(settings: dict[str, Any], sizes: Sizes) -> tuple[MemoryEstimate, int]:
    """The estimate, and the measured peak of a step."""
    model, optimizer, compute = split_settings(settings, sizes)
    plan = constant_plan(model.context_length, sizes.rows, 2)
    schedule = ScheduleConfig(total_steps=100, warmup_steps=0, learning_rate_decay="constant")
    recipe = Recipe(optimizer=optimizer, schedule=schedule)
    resolved = Resolved(recipe=recipe, model=model, compute=compute, plan=plan, total_steps=100)
    world = World(rank=0, size=1, device="cpu")
    state = build_state(resolved, init_weights(model, 1), world)
    ids = np.random.default_rng(1).integers(0, model.vocabulary, 4 * plan.tokens(0) + 1)
    training = build_training(resolved, state.model, Rows(ids, model.context_length), world)
    train_step(state, training)
    kept = sum(parameter.nbytes for parameter in state.model.parameters())
    kept += sum(tensor.nbytes for each in state.optimizer.state.values() for tensor in each.values())
    peak = kept + bytes_at_peak(lambda: train_step(state, training))
    return estimate_memory(model, sizes.rows, compute, optimizer=optimizer), peak


def compare(options: argparse.Namespace) -> measure.Report:
    """Every part in every precision. Raises ValueError for invalid options."""
    names = options.parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"--parts {', '.join(unknown)} is unknown; there are: {', '.join(PARTS)}")
    measure.check_counts(options, "layers", "rows")
    model = ModelConfig(
        n_layer=options.layers,
        n_head=8,
        n_embd=options.channels,
        context_length=options.context,
        vocab_size=options.vocabulary,
    )
    rows, measured = [], {}
    for precision in options.precisions:
        sizes = Sizes(model, options.rows, precision, options.compile)
        for name in names:
            torch.compiler.reset()
            estimate, peak = measure_part(PARTS[name], sizes)
            ratio = estimate.together / peak
            measured[f"{name} {precision}"] = {**vars(estimate), "peak": peak, "ratio": ratio}
            figures = [f"{value / 1e6:,.1f}" for value in (estimate.together, peak)]
            rows.append([name, precision, "yes" if options.compile else "no", *figures, f"{ratio:.3f}"])
    settings = {
        name: getattr(options, name) for name in ("layers", "channels", "context", "vocabulary", "rows")
    }
    return measure.Report(
        title="The memory estimate and the peak of a training step",
        headings=HEADINGS,
        rows=rows,
        measured=measured,
        settings=settings,
        notes=["A step has two micro-batches. Dropout is 0 unless a part says otherwise."],
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "layers")
    parser.set_defaults(layers=6)
    parser.add_argument("--parts", nargs="+", help="all if left out")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile the step")
    for name, size in (("channels", 256), ("context", 256), ("vocabulary", 4096), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=size)
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, compare)
