"""The command `overnight generate`: a model continues a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator

from overnight.config import raise_problems
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.distributed.world import open_world
from overnight.generation import GenerateConfig
from overnight.generation.generate import Completion, Decoding, check_prompts, complete, stream_text
from overnight.generation.quantize import DecodingPrecision, generation_precisions, prepare_for_generation
from overnight.terminal import echo

ROWS_AT_ONCE = 8  # a CPU reads the weights once for all of them; more rows bring it little


def run(config: GenerateConfig) -> None:
    """Write the completions and say how fast. Raises ValueError before any work if something is wrong."""
    raise_problems(config.problems(), "overnight generate")
    device = open_world(config.device).device
    precision = _choose_precision(config, device)
    opened = open_model(config.model)
    opened.model.to(device)
    prepare_for_generation(opened.model, precision)
    decoding = Decoding(max_new_tokens=config.max_new_tokens, sampling=config.sampling)
    started_at = time.perf_counter()
    if config.json or config.samples > 1 or len(config.prompts) > 1:
        tokens = _write_completions(config, opened, decoding, precision)
    else:
        tokens = _write_as_it_comes(config, opened, decoding)
    seconds = time.perf_counter() - started_at
    echo(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s on {device} in {precision}")
    name = opened.run.name if opened.run else "my-model"
    echo(
        f"next: overnight {f'convert {config.model} --to hf --out {name}-hf' if opened.run else 'quickstart'}"
    )


def _choose_precision(config: GenerateConfig, device: str) -> DecodingPrecision:
    """The one asked for, or the device's best. Raises ValueError for one that the device lacks."""
    found = generation_precisions(device)
    if config.precision is not None and config.precision not in found:
        raise ValueError(f"precision={config.precision} is not for {device}; take {' or '.join(found)}")
    return config.precision or found[0]


def _write_as_it_comes(config: GenerateConfig, opened: OpenedModel, decoding: Decoding) -> int:
    """Stream the one completion, prompt first; how many tokens were written."""
    prompt = "".join(config.prompts)
    pieces = stream_text(opened.model, opened.tokenizer, prompt, decoding, config.stop)
    _print(prompt)
    written = 0
    for piece in pieces:
        _print(piece)
        written += 1
    _print("\n")
    return written - 1  # the last piece is what was held back, and no token


def _write_completions(
    config: GenerateConfig, opened: OpenedModel, decoding: Decoding, precision: DecodingPrecision
) -> int:
    """Print every completion, a few at a time; how many tokens were written."""
    tokens = 0
    for number, (prompt, completion) in enumerate(_completions(config, opened, decoding)):
        tokens += len(completion.ids)
        if config.json:
            about = {"model": config.model, "prompt": prompt, "completion": completion.text}
            ending = {"tokens": len(completion.ids), "ended_by": completion.ended_by, "precision": precision}
            _print(json.dumps({**about, **ending}) + "\n")
        else:
            _print(("\n" if number else "") + prompt + completion.text + "\n")
    return tokens


def _completions(
    config: GenerateConfig, opened: OpenedModel, decoding: Decoding
) -> Iterator[tuple[str, Completion]]:
    """Each prompt with each of its completions. Their number is not bounded by memory."""
    prompts = config.prompts or ("",)
    check_prompts(opened.model, opened.tokenizer, prompts, decoding)
    total = len(prompts) * config.samples
    for first in range(0, total, ROWS_AT_ONCE):
        asked = [prompts[row // config.samples] for row in range(first, min(first + ROWS_AT_ONCE, total))]
        part = dataclasses.replace(decoding, first_row=first)
        yield from zip(asked, complete(opened.model, opened.tokenizer, asked, part, config.stop), strict=True)


def _print(text: str) -> None:
    """To standard output, at once; what its encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
