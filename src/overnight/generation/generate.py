"""Prompts to completions: key-value cache, batches of unequal prompts, stop strings, streaming.

A row's result does not depend on the other rows of its batch: its noise is a hash of (seed, row, position),
and shorter prompts are padded on the left, in cache columns that are masked.

Beyond the context: a model reads at most `context_length` ids. When a row has more, the newest
`(context_length + 1) // 2` ids are read again, at positions from 0, and the older ones are dropped.

Shapes: B rows, T positions of this call, S columns of the cache, D channels of a head.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from overnight.generation import EMPTY_STOP, SamplingConfig
from overnight.generation.sampling import sample
from overnight.model.gpt import GPT, eval_mode
from overnight.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are drawn, and when they end."""

    max_new_tokens: int = 128
    """Most tokens of a completion."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, top-k, top-p and seed."""
    end_of_text: int | None = None
    """The id that starts an empty prompt. None: no id does. `complete` and `stream_text` then use the
    tokenizer's."""
    end_ids: frozenset[int] | None = None
    """The ids that end a completion, without being part of it; None: `end_of_text`."""
    vocab_size: int | None = None
    """Draw only ids below this; None: any. `complete` and `stream_text` then use the tokenizer's."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion of `complete` and `stream_text`, and are not part of it."""
    first_row: int = 0
    """Index of the first prompt: a batch drawn in two halves gets the same noise as the whole."""

    def with_vocabulary(self, tokenizer: Tokenizer) -> Decoding:
        """The same, `end_of_text` and `vocab_size` taken from the tokenizer where they are None."""
        end_of_text = tokenizer.end_of_text if self.end_of_text is None else self.end_of_text
        vocab_size = tokenizer.vocab_size if self.vocab_size is None else self.vocab_size
        return replace(self, end_of_text=end_of_text, vocab_size=vocab_size)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion of a prompt."""

    text: str
    """The completion without its stop string."""
    ids: list[int]
    """All generated ids, including those of the stop string, without the end of text."""
    ended_by: Literal["length", "end of text", "stop string"]


class KVCache:
    """Preallocated keys and values of every layer. The newest id of each row is in the same column.

    A row shorter than the longest starts at a later column; the columns before it are padding, which is
    masked.
    """

    def __init__(self, model: GPT, lengths: Sequence[int], columns: int) -> None:
        config, weight = model.config, model.wte.weight
        self.context_length = config.context_length
        heads, key_channels, value_channels = config.cached_channels
        shape = (config.n_layer, len(lengths), heads, columns)
        self._keys = weight.new_empty(*shape, key_channels)
        self._values = weight.new_empty(*shape, value_channels)
        padding = [max(lengths) - length for length in lengths]
        self._padding_B = torch.tensor(padding, device=weight.device) if any(padding) else None
        self._start, self._end = 0, 0
        self._mask: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """True if no column is left."""
        return self._end == self._keys.shape[3]

    def extend(self, length: int) -> None:
        """Reserve the next `length` columns for the coming forward pass."""
        self._start, self._end = self._end, self._end + length
        assert length == 1 or self._start == 0, "after the prompt, ids are read one by one"
        assert self._end <= self._keys.shape[3], "the cache is full"
        self._mask = self._visible()

    def positions(self, length: int) -> Tensor:
        """Positions of the ids being read, int64 (T,), or (B, T) where rows differ."""
        columns_T = torch.arange(self._start, self._start + length, device=self._keys.device)
        if self._padding_B is None:
            return columns_T
        return (columns_T - self._padding_B[:, None]).clamp(min=0)

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one layer's keys and values; returns all stored so far (views), and the attention mask."""
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._start : self._end] = k_BHTD
        values[:, :, self._start : self._end] = v_BHTD
        return keys[:, :, : self._end], values[:, :, : self._end], self._mask

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]
        if self._padding_B is not None:
            self._padding_B = self._padding_B[rows]

    def _visible(self) -> Tensor | None:
        """The mask of the model's cache protocol, bool (B, 1, T, S); None if only the causal mask applies."""
        if self._padding_B is None:
            return None
        columns_S = torch.arange(self._end, device=self._keys.device)
        columns_T1 = columns_S[self._start :, None]
        visible = (columns_S <= columns_T1) & (columns_S >= self._padding_B[:, None, None, None])
        return visible | (columns_S == columns_T1)  # a softmax over an empty set is NaN


@dataclass
class _Row:
    """One completion being written."""

    index: int
    window: list[int]
    """The newest ids, which the model reads."""
    length: int
    """Ids in all, the prompt's included."""


class TokenGenerator:
    """Draws the next id of every row, one forward pass for each iteration.

    Iterating yields {row: new id} for the rows that are still written. A row ends after `max_new_tokens`,
    before an id of `end_ids`, or after `stop(row)`. The model is in evaluation mode until the iterator ends
    or is closed. Raises ValueError for invalid prompts and settings, when it is made, and FloatingPointError
    while iterating if logits are not finite.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
        problems = [*decoding.sampling.problems(), *_prompt_problems(model, prompts, decoding)]
        if problems:
            raise ValueError("; ".join(problems))
        self.model, self.decoding = model, decoding
        self._prompts = [list(ids) or [decoding.end_of_text or 0] for ids in prompts]
        self._stopped: set[int] = set()

    def stop(self, row: int) -> None:
        """Draw no more ids for `row`."""
        self._stopped.add(row)

    def __iter__(self) -> Iterator[dict[int, int]]:
        decoding = self.decoding
        end_ids = {decoding.end_of_text} if decoding.end_ids is None else decoding.end_ids
        rows = [_Row(index, list(ids), len(ids)) for index, ids in enumerate(self._prompts)]
        cache = None
        with eval_mode(self.model):
            for remaining in range(decoding.max_new_tokens, 0, -1):
                if not rows:
                    return
                too_long = cache is not None and any(len(row.window) > cache.context_length for row in rows)
                if cache is None or cache.is_full or too_long:
                    cache, ids_BT = _refill(self.model, rows, remaining)
                else:
                    ids_BT = [row.window[-1:] for row in rows]
                logits_BV = _next_logits(self.model, ids_BT, cache)[:, : decoding.vocab_size]
                noise_rows = [decoding.first_row + row.index for row in rows]
                drawn = sample(logits_BV, decoding.sampling, noise_rows, [row.length for row in rows])
                new = {}
                for row, token in zip(rows, drawn.tolist(), strict=True):
                    row.window.append(token)
                    row.length += 1
                    if token not in end_ids:
                        new[row.index] = token
                yield new
                kept = [
                    i for i, row in enumerate(rows) if row.index in new and row.index not in self._stopped
                ]
                if len(kept) < len(rows):
                    rows = [rows[i] for i in kept]
                    cache.keep(kept)


def generate(model: GPT, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
    """The new ids of each prompt, without the prompt and the end of text; errors as in TokenGenerator."""
    completions: list[list[int]] = [[] for _ in prompts]
    for new in TokenGenerator(model, prompts, decoding):
        for row, token in new.items():
            completions[row].append(token)
    return completions


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: Decoding,
) -> list[Completion]:
    """One completion for each prompt (texts, or their ids), all in one batch; errors as in `stream_text`."""
    writers = [TextWriter(tokenizer, decoding.stop) for _ in prompts]
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    tokens = TokenGenerator(model, rows, decoding.with_vocabulary(tokenizer))
    for new in tokens:
        for row, token in new.items():
            writers[row].write(token)
            if writers[row].stopped:
                tokens.stop(row)
    return [writer.completion(decoding.max_new_tokens) for writer in writers]


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, decoding: Decoding) -> Iterator[str]:
    """Yield the completion in pieces: one for each new id, which may be "", and then the held-back rest.

    Together they are `tokenizer.decode` of the new ids, cut before the first stop string. Text that may be
    half a character or the beginning of a stop string is held back until the next id. Stop strings are
    searched for in the completion only, and may begin and end within a token. Raises ValueError, when
    called, for invalid settings and a prompt that does not fit the context.
    """
    writer = TextWriter(tokenizer, decoding.stop)
    tokens = TokenGenerator(model, [tokenizer.encode(prompt)], decoding.with_vocabulary(tokenizer))

    def pieces() -> Iterator[str]:
        for new in tokens:
            if new:
                yield writer.write(new[0])
            if writer.stopped:
                tokens.stop(0)
        yield writer.finish()

    return pieces()  # a separate generator, so that the errors above are raised by the call


def _prompt_problems(model: GPT, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[str]:
    found = []
    if decoding.max_new_tokens < 0:
        found.append(f"max_new_tokens={decoding.max_new_tokens} must be at least 0")
    if "" in decoding.stop:
        found.append(EMPTY_STOP)
    for number, ids in enumerate(prompts, start=1):
        prompt = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not ids and decoding.end_of_text is None:
            found.append(f"{prompt} is empty, and no end_of_text is given to start from")
        if len(ids) > model.config.context_length:
            found.append(
                f"{prompt} has {len(ids):,} tokens and the model reads at most "
                f"{model.config.context_length:,}; shorten it"
            )
        invalid = [token for token in ids if not 0 <= token < model.vocab_size]
        if invalid:
            found.append(
                f"{prompt} contains the id {invalid[0]}; the model's ids are 0 to {model.vocab_size - 1}"
            )
    return found


def _refill(model: GPT, rows: list[_Row], remaining: int) -> tuple[KVCache, list[list[int]]]:
    """An empty cache for the windows of `rows`, and the windows, full ones halved, padded on the left."""
    context_length = model.config.context_length
    for row in rows:
        if len(row.window) > context_length:
            row.window = row.window[-((context_length + 1) // 2) :]
    lengths = [len(row.window) for row in rows]
    cache = KVCache(model, lengths, min(context_length, max(lengths) + remaining))
    return cache, [[0] * (max(lengths) - len(row.window)) + row.window for row in rows]


@torch.inference_mode()
def _next_logits(model: GPT, ids_BT: list[list[int]], cache: KVCache) -> Tensor:
    """Logits (B, V) for the id after the last of each row; the head is computed only there."""
    ids = torch.tensor(ids_BT, device=model.wte.weight.device)
    cache.extend(ids.shape[1])
    return model.head(model.trunk(ids, cache)[:, -1])


class TextWriter:
    """Turns one completion's ids into text, releasing only what no later id can change."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._bytes = tokenizer.token_bytes()
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self.stopped = False
        """True once a stop string is complete."""

    def write(self, token: int) -> str:
        """Take one id; returns the text that no later id can change."""
        self._ids.append(token)
        return self._release(self._decoder.decode(self._bytes[token]))

    def finish(self) -> str:
        """Return the held-back text: no id follows."""
        piece = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._pieces.append(rest)
        return piece + rest

    def completion(self, max_new_tokens: int) -> Completion:
        """The whole completion; call it after `finish`."""
        self.finish()
        ended_by: Literal["length", "end of text", "stop string"] = "end of text"
        if self.stopped:
            ended_by = "stop string"
        elif len(self._ids) == max_new_tokens:
            ended_by = "length"
        return Completion(text="".join(self._pieces), ids=self._ids, ended_by=ended_by)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, end, self._held = True, min(starts), ""
        else:
            prefixes = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
            end = len(text) - max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
            self._held = text[end:]
        self._pieces.append(text[:end])
        return text[:end]
