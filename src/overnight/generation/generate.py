"""Prompts -> completions: a key-value cache, batches of unequal prompts, text that streams.

A row's result never depends on its neighbours: the noise is a hash of (seed, row, position), and
shorter prompts are moved to the right in the cache behind columns that nobody looks at.

Beyond the context: a model reads at most `context_length` ids. When a row has more, its oldest half
is dropped and the newest `(context_length + 1) // 2` ids are read again, at positions from 0.

Shapes: B rows, T positions of this call, S columns of the cache, H heads, D channels a head.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from overnight.generation import SamplingConfig
from overnight.generation.sampling import sample
from overnight.model.gpt import GPT, eval_mode
from overnight.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are drawn, and when they end."""

    max_new_tokens: int = 128
    """A completion ends after this many tokens, if nothing ended it before."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, top-k, top-p and seed."""
    end_of_text: int | None = None
    """The id that ends a completion, of which it is no part, and from which an empty prompt starts.
    None: no id ends one (`complete` and `stream_text` then take the tokenizer's)."""
    vocab_size: int | None = None
    """Draw only ids below this; None: any (`complete` and `stream_text` then take the tokenizer's)."""
    first_row: int = 0
    """Number of the first prompt among all: a batch in two halves draws the same noise as the whole."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str
    """Without the stop string that ended it."""
    ids: list[int]
    """Every id drawn, those of the stop string included, the end of text excluded."""
    ended_by: Literal["length", "end of text", "stop string"]


class KVCache:
    """Keys and values of every layer, preallocated. The newest id of each row stands in the same column.

    A row shorter than the longest starts at a later column; the columns before it are padding,
    which its ids never look at.
    """

    def __init__(self, model: GPT, lengths: Sequence[int], columns: int) -> None:
        config, weight = model.config, model.wte.weight
        self.context_length = config.context_length
        D = config.n_embd // config.n_head
        shape = (config.n_layer, len(lengths), config.n_head, columns, D)
        self._keys, self._values = weight.new_empty(shape), weight.new_empty(shape)
        padding = [max(lengths) - length for length in lengths]
        self._padding_B = torch.tensor(padding, device=weight.device) if any(padding) else None
        self._start, self._end = 0, 0
        self._mask: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """True if there is no column left."""
        return self._end == self._keys.shape[3]

    def extend(self, length: int) -> None:
        """Make the next `length` columns those that the model is about to fill."""
        self._start, self._end = self._end, self._end + length
        assert self._end <= self._keys.shape[3], "the cache is full"
        self._mask = self._visible(length)

    def positions(self, length: int) -> Tensor:
        """Positions of the ids being read, int64 (T,), or (B, T) where rows differ."""
        columns_T = torch.arange(self._start, self._start + length, device=self._keys.device)
        if self._padding_B is None:
            return columns_T
        return (columns_T - self._padding_B[:, None]).clamp(min=0)

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write one layer's keys and values in place; views of all so far, and who may look at whom."""
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._start : self._end] = k_BHTD
        values[:, :, self._start : self._end] = v_BHTD
        return keys[:, :, : self._end], values[:, :, : self._end], self._mask

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]
        if self._padding_B is not None:
            self._padding_B = self._padding_B[rows]

    def _visible(self, length: int) -> Tensor | None:
        """The mask of the protocol, bool (B or 1, 1, T, S), or None."""
        if self._padding_B is None and (length == 1 or self._start == 0):
            return None
        columns_S = torch.arange(self._end, device=self._keys.device)
        columns_T1 = columns_S[self._start :, None]
        visible = columns_S <= columns_T1
        if self._padding_B is not None:
            # Padding looks at itself, since a softmax over nothing is not a number.
            visible = visible & (columns_S >= self._padding_B[:, None, None, None]) | (
                columns_S == columns_T1
            )
        return visible


def generate(model: GPT, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
    """The new ids of each prompt, without the prompt and without the end of text.

    Raises ValueError for prompts that do not fit the model and settings that make no sense, and
    FloatingPointError for a model that is broken.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for new in stream_ids(model, prompts, decoding):
        for row, token in new.items():
            completions[row].append(token)
    return completions


def stream_ids(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: Callable[[int, int], bool] = lambda _row, _id: False,
) -> Iterator[dict[int, int]]:
    """Yield {row: new id} for the rows still being written, once per forward pass.

    A row ends with `max_new_tokens`, before `end_of_text`, or after an id for which `ends(row, id)`
    is true. Problems are raised here, not at the first id. The model is in evaluation mode until the
    iterator ends or is closed.
    """
    problems = [*decoding.sampling.problems(), *_problems(model, prompts, decoding)]
    if problems:
        raise ValueError("; ".join(problems))
    starts = [list(ids) or [decoding.end_of_text or 0] for ids in prompts]
    return _write(model, [_Row(number, ids, len(ids)) for number, ids in enumerate(starts)], decoding, ends)


def _problems(model: GPT, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[str]:
    found = []
    if decoding.max_new_tokens < 0:
        found.append(f"max_new_tokens={decoding.max_new_tokens} must be at least 0")
    for number, ids in enumerate(prompts, start=1):
        prompt = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not ids and decoding.end_of_text is None:
            found.append(f"{prompt} is empty, and no end_of_text is given to start from")
        if len(ids) > model.config.context_length:
            found.append(
                f"{prompt} has {len(ids):,} tokens and the model reads at most "
                f"{model.config.context_length:,}; shorten it"
            )
        strange = [token for token in ids if not 0 <= token < model.vocab_size]
        if strange:
            found.append(f"{prompt} holds the id {strange[0]}; the model knows 0 to {model.vocab_size - 1}")
    return found


@dataclass
class _Row:
    """One completion being written."""

    number: int
    window: list[int]
    """The ids it reads: the newest of all."""
    length: int
    """Ids in all, the prompt's included."""

    def add(self, token: int) -> None:
        self.window.append(token)
        self.length += 1


def _write(
    model: GPT, rows: list[_Row], decoding: Decoding, ends: Callable[[int, int], bool]
) -> Iterator[dict[int, int]]:
    """The loop of `stream_ids`: read, draw, and let go the rows that have ended."""
    cache = None
    with eval_mode(model):
        for left in range(decoding.max_new_tokens, 0, -1):
            if not rows:
                return
            if cache is None or cache.is_full or any(len(row.window) > cache.context_length for row in rows):
                cache, ids_BT = _read_again(model, rows, left)
            else:
                ids_BT = [row.window[-1:] for row in rows]
            logits_BV = _next_logits(model, ids_BT, cache)[:, : decoding.vocab_size]
            places = [decoding.first_row + row.number for row in rows], [row.length for row in rows]
            drawn = sample(logits_BV, decoding.sampling, *places).tolist()
            new = {row.number: token for row, token in zip(rows, drawn, strict=True)}
            for row in rows:
                row.add(new[row.number])
            new = {number: token for number, token in new.items() if token != decoding.end_of_text}
            going = [i for i, row in enumerate(rows) if _goes_on(row.number, new, ends)]
            yield new
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                cache.keep(going)


def _goes_on(row: int, new: dict[int, int], ends: Callable[[int, int], bool]) -> bool:
    return row in new and not ends(row, new[row])


def _read_again(model: GPT, rows: list[_Row], left: int) -> tuple[KVCache, list[list[int]]]:
    """An empty cache for the windows of `rows`, full ones halved, and the windows padded on the left."""
    context_length = model.config.context_length
    for row in rows:
        if len(row.window) > context_length:
            row.window = row.window[-((context_length + 1) // 2) :]
    lengths = [len(row.window) for row in rows]
    cache = KVCache(model, lengths, min(context_length, max(lengths) + left))
    return cache, [[0] * (max(lengths) - len(row.window)) + row.window for row in rows]


@torch.inference_mode()
def _next_logits(model: GPT, ids_BT: list[list[int]], cache: KVCache) -> Tensor:
    """Logits (B, V) for the id after the last of each row; only there is the head computed."""
    ids = torch.tensor(ids_BT, device=model.wte.weight.device)
    cache.extend(ids.shape[1])
    return model.head(model.trunk(ids, cache)[:, -1])


def check_prompts(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], decoding: Decoding) -> None:
    """Raise ValueError where `complete` would, for as many prompts as there are: before any is continued."""
    stream_ids(model, [tokenizer.encode(prompt) for prompt in prompts], _with_vocabulary(decoding, tokenizer))


def complete(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], decoding: Decoding, stop: Sequence[str] = ()
) -> list[Completion]:
    """One completion for each prompt, all written at once; `stop` and the errors as in `stream_text`."""
    decoding = _with_vocabulary(decoding, tokenizer)
    ids: list[list[int]] = [[] for _ in prompts]
    writers = [TextWriter(tokenizer, stop) for _ in prompts]
    texts = ["" for _ in prompts]

    def ends(row: int, token: int) -> bool:
        ids[row].append(token)
        texts[row] += writers[row].write(token)
        return writers[row].stopped

    for _ in stream_ids(model, [tokenizer.encode(prompt) for prompt in prompts], decoding, ends):
        pass
    return [
        Completion(
            text=text + writer.finish(),
            ids=drawn,
            ended_by=_ended_by(writer, len(drawn), decoding.max_new_tokens),
        )
        for text, writer, drawn in zip(texts, writers, ids, strict=True)
    ]


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, decoding: Decoding, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the completion in pieces: one for each new id, perhaps "", and then what was held back.

    Together they are `tokenizer.decode` of the new ids, cut before the first stop string: text
    that may be half a character or the beginning of a stop string waits for the next id. A stop
    string is looked for in the completion only, and may begin and end within a token.
    Raises ValueError for settings that make no sense and a prompt that does not fit.
    """
    writer = TextWriter(tokenizer, stop)
    pieces: list[str] = []

    def ends(_row: int, token: int) -> bool:
        pieces.append(writer.write(token))
        return writer.stopped

    drawn = stream_ids(model, [tokenizer.encode(prompt)], _with_vocabulary(decoding, tokenizer), ends)

    def stream() -> Iterator[str]:
        for new in drawn:
            if new:
                yield pieces.pop()
        yield writer.finish()

    return stream()


class TextWriter:
    """Turns one completion's ids into text, releasing only what no later id can change."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ValueError('a stop string is "", which every text contains; leave it out')
        self._bytes = tokenizer.token_bytes()
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def write(self, token: int) -> str:
        """Take one id; return the text that is certain by now. `stopped` if a stop string is complete."""
        return self._release(self._decoder.decode(self._bytes[token]))

    def finish(self) -> str:
        """Return what was held back: no id follows."""
        piece = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return piece + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        beginnings = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        waiting = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]


def _ended_by(
    writer: TextWriter, tokens: int, max_new_tokens: int
) -> Literal["length", "end of text", "stop string"]:
    if writer.stopped:
        return "stop string"
    return "length" if tokens == max_new_tokens else "end of text"


def _with_vocabulary(decoding: Decoding, tokenizer: Tokenizer) -> Decoding:
    """`decoding` with what was left to the tokenizer."""
    if decoding.end_of_text is None:
        decoding = replace(decoding, end_of_text=tokenizer.end_of_text)
    if decoding.vocab_size is None:
        decoding = replace(decoding, vocab_size=tokenizer.vocab_size)
    return decoding
