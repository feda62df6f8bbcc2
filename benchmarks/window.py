"""How long attention within a window takes, forward and backward, beside attention over the whole context.

python benchmarks/window.py --context 1024 --window 256
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import measure
from overnight.model.kernels import Visible, attend_in_blocks
from overnight.model.windows import attend_in_window

HEADINGS = ("side", "precision", "median ms", "min", "max", "against the whole context")
HEADS, CHANNELS = 12, 64  # of GPT-2 124M


def masked(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The plain way: a mask in the full square."""
    index = torch.arange(q.shape[2])
    distance = index[:, None] - index
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < window))


def build_sides(rows: int, context: int, window: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Each side's forward and backward pass."""
    torch.manual_seed(0)
    shape = (rows, context, 3, HEADS, CHANNELS)
    qkv = torch.randn(shape).to(dtype).requires_grad_()
    kernel = "fused" if dtype is torch.float32 else "blocks"
    ways = {
        "whole context": lambda q, k, v: attend_in_blocks(q, k, v, is_causal=True),
        "window, by a mask": lambda q, k, v: masked(q, k, v, window),
        "window": lambda q, k, v: attend_in_window(q, k, v, Visible(None, None, window), kernel, 0.0),
    }

    def step(attend: Callable[..., Tensor]) -> None:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend(q, k, v).transpose(1, 2).flatten(2).sum().backward()  # type: ignore[no-untyped-call]
        qkv.grad = None

    return {name: lambda attend=attend: step(attend) for name, attend in ways.items()}  # type: ignore[misc]


def compare(options: argparse.Namespace) -> measure.Report:
    """Both precisions. Raises ValueError for invalid options."""
    measure.check_counts(options, "rows", "context", "window")
    table, measured = [], {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sides = build_sides(options.rows, options.context, options.window, dtype)
        times = measure.interleave_times(sides, options.repeats, warm_ups=1)
        for name, found in times.items():
            measured[f"{name} {precision}"] = found
            ratio = measure.times_as_fast(found, times["whole context"])
            table.append([name, precision, *measure.spread(found), ratio])
    return measure.Report(
        title=f"Attention over {options.context:,} positions and within {options.window:,}",
        headings=HEADINGS,
        rows=table,
        measured=measured,
        settings={"rows": options.rows, "heads": HEADS, "channels": CHANNELS, "repeats": options.repeats},
        notes=["Forward and backward; the sides in turn. In bf16 as block attention, as a CPU trains."],
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, repeats=10)
    for name, size in (("rows", 4), ("context", 1024), ("window", 256)):
        parser.add_argument(f"--{name}", type=int, default=size)
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, compare)
