"""What fewer bits cost: a trained model's loss on a text in every precision that `overnight generate` has.

    python benchmarks/rounding.py runs/quickstart --text held-out.txt

The model is whatever `overnight generate` takes, the text one that it was not trained on. Each precision
is held against float32, id by id, so that a small loss shows in a short text.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

HEADINGS = ("precision", "nats per token", "more than fp32", "±", "other likeliest id", "a logit moves by")
ROWS_AT_ONCE = 8


def report(options: argparse.Namespace) -> measure.Report:
    """Evaluate the text with every precision."""
    import torch

    from overnight.conversion.open_model import open_model
    from overnight.generation.quantize import generation_precisions, prepare_for_generation

    text = Path(options.text)
    if not text.is_file():
        raise ValueError(f"there is no file {text}; name one with --text")
    opened = open_model(options.model)
    context = opened.model.config.context_length
    ids = opened.tokenizer.encode(text.read_text(encoding="utf-8"))[: options.tokens + 1]
    if len(ids) <= context:
        raise ValueError(f"{text} holds {len(ids):,} tokens; give more than the context's {context:,}")
    windows = [ids[i : i + context + 1] for i in range(0, len(ids) - context, context)]
    batches = torch.split(torch.tensor(windows), ROWS_AT_ONCE)
    precisions = ["fp32", *(name for name in generation_precisions("cpu") if name != "fp32")]
    models = {name: copy.deepcopy(opened.model) for name in precisions}
    for name, model in models.items():
        prepare_for_generation(model, name)  # type: ignore[arg-type]  # a list of them, in another order
    found = [evaluate(models, batch) for batch in batches]
    evaluated = {
        name: [torch.cat(parts) for parts in zip(*(each[name] for each in found), strict=True)]
        for name in models
    }
    return measure.Report(
        title=f"What fewer bits cost {options.model}",
        headings=HEADINGS,
        rows=[table_row(name, evaluated[name], evaluated["fp32"][0]) for name in models],
        measured={name: [float(part.mean()) for part in parts] for name, parts in evaluated.items()},
        settings={"text": text.name, "tokens": len(windows) * context, "context": context},
    )


def evaluate(models: dict[str, Any], ids_BT: Any) -> dict[str, list[Any]]:
    """By precision, for each target: nats, whether another id is likeliest, and how far logits moved."""
    import torch
    import torch.nn.functional as F

    targets = ids_BT[:, 1:].flatten()
    found, reference = {}, None
    with torch.inference_mode():
        for name, model in models.items():
            logits = model(ids_BT[:, :-1]).flatten(0, 1).double()
            reference = logits if reference is None else reference
            found[name] = [
                F.cross_entropy(logits, targets, reduction="none"),
                (logits.argmax(-1) != reference.argmax(-1)).double(),
                (logits - reference).abs().mean(-1),
            ]
    return found


def table_row(name: str, parts: list[Any], reference: Any) -> list[str]:
    """One precision's line; the interval is 1.96 standard errors of the paired difference."""
    nats, others, moved = parts
    more = nats - reference
    return [
        name,
        f"{nats.mean():.5f}",
        f"{more.mean():+.5f}",
        f"{1.96 * more.std() / len(more) ** 0.5:.5f}",
        f"{100 * others.mean():.2f}%",
        f"{moved.mean():.5f}",
    ]


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__)
    parser.add_argument("model", help="a run, a checkpoint, a Hugging Face folder or name")
    parser.add_argument("--text", required=True, help="a file the model was not trained on")
    parser.add_argument("--tokens", type=int, default=50_000, help="at most this number")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
