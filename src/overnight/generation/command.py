"""The command `overnight generate`: a model continues a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from overnight.generation.sampling import SamplingConfig
from overnight.terminal import echo

if TYPE_CHECKING:
    from overnight.conversion.open_model import OpenedModel
    from overnight.generation.generate import Completion, Decoding
    from overnight.generation.quantize import DecodingPrecision

ROWS_AT_ONCE = 8  # a CPU reads the weights once for all of them; more rows bring it little


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue one or more prompts; the text goes to standard output as it is written."""

    model: Positional[str]
    """A run, a checkpoint, a Hugging Face folder or name."""
    prompts: Positional[tuple[str, ...]] = ()
    """Texts to continue, each in quotes; without any, a text is begun."""
    max_new_tokens: int = 128
    """Write at most this many tokens; an end of text ends it before."""
    temperature: float = SamplingConfig.temperature
    """Below 1 surer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = SamplingConfig.top_k
    """Draw only from this many likeliest tokens; None from all."""
    top_p: float | None = SamplingConfig.top_p
    """Draw only from the fewest likeliest tokens whose probabilities reach this sum."""
    seed: int = SamplingConfig.seed
    """Another seed, another text."""
    samples: int = 1
    """Completions of each prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, of which they are no part."""
    json: bool = False
    """Print one JSON object for each completion to standard output."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; the best one found if left out."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] | None = None
    """Of the weights; the best of the device if left out (fp16 on most CPUs). int8 takes least memory."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one plain sentence each; [] if nothing."""
        found = self.sampling.problems()
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.samples < 1:
            found.append(f"samples={self.samples} must be at least 1")
        if "" in self.stop:
            found.append("a stop text is empty, and every text contains that; leave it out")
        return found

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
        )


def run(config: GenerateConfig) -> None:
    """Write the completions and say how fast. Raises ValueError before any work if something is wrong."""
    from overnight.config import raise_problems
    from overnight.conversion.open_model import open_model
    from overnight.distributed.world import open_world
    from overnight.generation.generate import Decoding
    from overnight.generation.quantize import prepare_for_generation

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
    from overnight.generation.quantize import generation_precisions

    found = generation_precisions(device)
    if config.precision is not None and config.precision not in found:
        raise ValueError(f"precision={config.precision} is not for {device}; take {' or '.join(found)}")
    return config.precision or found[0]


def _write_as_it_comes(config: GenerateConfig, opened: OpenedModel, decoding: Decoding) -> int:
    """Stream the one completion, prompt first; how many tokens were written."""
    from overnight.generation.generate import stream_text

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
    from overnight.generation.generate import check_prompts, complete

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
