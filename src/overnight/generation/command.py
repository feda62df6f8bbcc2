"""The command `overnight generate`: a model continues a text."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from overnight.config import raise_problems
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.data.text_files import refuse_wide_encoding
from overnight.distributed.world import open_world
from overnight.generation import GenerateConfig
from overnight.generation.generate import Decoding, TokenGenerator, complete, stream_text
from overnight.generation.quantize import (
    GenerationPrecision,
    generation_precisions,
    prepare_for_generation,
    unsuitable_reason,
)
from overnight.terminal import echo, shell_command

BATCH_ROWS = 8  # a CPU reads the weights once per batch; more rows gain little


def run(config: GenerateConfig) -> None:
    """Print the completions and the speed. Raises ValueError before any text if something is wrong."""
    raise_problems(config.problems(), "overnight generate")
    config = _with_prompts(config)
    device = open_world(config.device).device
    supported = generation_precisions(device)
    if config.precision not in {None, *supported}:
        raise ValueError(
            f"precision={config.precision} is not supported on {device}; use {' or '.join(supported)}"
        )
    opened = open_model(config.model)
    opened.model.to(device)
    precision = _choose_precision(config, opened, supported)
    prepare_for_generation(opened.model, precision)
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens, sampling=config, stop=config.stop, end_ids=opened.end_ids
    )
    started_at = time.perf_counter()
    if config.json or config.samples > 1 or len(config.prompts) > 1:
        tokens = _print_completions(config, opened, decoding, precision)
    else:
        tokens = _print_stream(config, opened, decoding)
    seconds = time.perf_counter() - started_at
    echo(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.1f} tokens/s on {device} in {precision}")
    following = shell_command("quickstart")
    if opened.run:
        following = shell_command("convert", config.model, "--to", "hf", "--out", f"{opened.run.name}-hf")
    echo(f"next: {following}")


def _with_prompts(config: GenerateConfig) -> GenerateConfig:
    """The config with the prompts of a file or of standard input, if it names one; says which.

    Raises ValueError if there is none in it.
    """
    name = config.prompt_file
    if name is None and config.prompts != ("-",):
        return config
    source = "standard input" if name in {None, "-"} else str(name)
    try:
        data = sys.stdin.buffer.read() if name in {None, "-"} else Path(source).read_bytes()
        refuse_wide_encoding(data, source)
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # every line end as \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        raise ValueError(f"{source} holds no prompt: it is empty")
    if name is None:
        prompts: tuple[str, ...] = (text.removesuffix("\n"),)  # which `echo` and editors add
        echo(f"prompt: all of {source}, {len(prompts[0]):,} characters")
    else:
        prompts = tuple(line for line in text.split("\n") if line.strip())
        echo(f"prompts: {len(prompts):,} lines of {source}, one prompt a line")
    return dataclasses.replace(config, prompts=prompts, prompt_file=None)


def _choose_precision(
    config: GenerateConfig, opened: OpenedModel, supported: Sequence[GenerationPrecision]
) -> GenerationPrecision:
    """The given precision, or the first supported one that holds the model.

    Raises ValueError if the given one does not hold it.
    """
    for precision in (config.precision,) if config.precision else supported:
        reason = unsuitable_reason(opened.model, precision)
        if reason is None:
            return precision
        if config.precision is None:
            echo(f"{config.model}: {reason}; another precision is used")
    raise ValueError(f"{config.model}: {reason}; leave --precision out, or give fp32")


def _print_stream(config: GenerateConfig, opened: OpenedModel, decoding: Decoding) -> int:
    """Stream the one completion after its prompt; returns the number of tokens."""
    prompt = "".join(config.prompts)
    pieces = stream_text(opened.model, opened.tokenizer, prompt, decoding)
    _print(prompt)
    count = 0
    for piece in pieces:
        _print(piece)
        count += 1
    _print("\n")
    return count - 1  # the last piece is the held-back rest, not a token


def _print_completions(
    config: GenerateConfig, opened: OpenedModel, decoding: Decoding, precision: GenerationPrecision
) -> int:
    """Print every completion, in batches to limit memory; returns the number of tokens."""
    model, tokenizer, prompts = opened.model, opened.tokenizer, config.prompts or ("",)
    # Raises ValueError for an invalid prompt before the first one is completed.
    TokenGenerator(
        model, [tokenizer.encode(prompt) for prompt in prompts], decoding.with_vocabulary(tokenizer)
    )
    tokens, total = 0, len(prompts) * config.samples
    for first in range(0, total, BATCH_ROWS):
        batch = [prompts[row // config.samples] for row in range(first, min(first + BATCH_ROWS, total))]
        part = dataclasses.replace(decoding, first_row=first)
        completions = complete(model, tokenizer, batch, part)
        for row, (prompt, completion) in enumerate(zip(batch, completions, strict=True), start=first):
            tokens += len(completion.ids)
            if config.json:
                values = {
                    "model": config.model,
                    "prompt": prompt,
                    "completion": completion.text,
                    "tokens": len(completion.ids),
                    "ended_by": completion.ended_by,
                    "precision": precision,
                }
                _print(json.dumps(values) + "\n")
            else:
                _print(("\n" if row else "") + prompt + completion.text + "\n")
    return tokens


def _print(text: str) -> None:
    """Write to standard output and flush; characters that its encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
