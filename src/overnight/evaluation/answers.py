"""A model asked in text: how likely a continuation is, how likely a whole text, and how a prompt goes on.

Texts are divided into ids as lm-evaluation-harness divides them for a causal model of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from overnight.evaluation.passages import Passage, Scored, cut_windows, judge_passages
from overnight.generate import Decoding, TextWriter, stream_ids
from overnight.model.gpt import GPT
from overnight.parallel import autocast
from overnight.sampling import SamplingConfig
from overnight.terminal import progress
from overnight.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192  # of prompts and completions together: their memory takes 600 MB of a GPT-2 124M
NOTHING = Scored(0.0, True)


@dataclass(frozen=True)
class Wish:
    """How a prompt is to be completed."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingConfig


@dataclass(frozen=True)
class Answers:
    """What a model with its tokenizer answers, in the order of the questions."""

    model: GPT
    tokenizer: Tokenizer
    precision: str

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Of each (context, continuation) the continuation's nats, and whether greedy decoding writes it.

        The first tokens of a context that is too long are left out; an empty one is the end of text. Raises
        ValueError for a continuation that the model can't read at once.
        """
        context_length = self.model.config.context_length
        passages: list[Passage] = []
        for context, continuation in self._encode(pairs):
            if len(continuation) > context_length:
                raise ValueError(
                    f"a continuation of {len(continuation):,} tokens does not fit the model's context of "
                    f"{context_length:,}: leave this task out, or take a model with a longer context"
                )
            passages.append(Passage((context + continuation)[-context_length - 1 :], len(continuation)))
        return self._judge(passages)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The nats of each whole text after an end of text: in windows, each token judged once."""
        context_length = self.model.config.context_length
        windows = [
            list(cut_windows([self.tokenizer.end_of_text, *ids.tolist()], context_length))
            for ids in self.tokenizer.encode_batch(texts)
        ]
        judged = iter(self._judge(list(chain.from_iterable(windows))))
        return [sum(scored.nats for scored in islice(judged, len(each))) for each in windows]

    def completions(self, prompts: Sequence[tuple[str, Wish]]) -> list[str]:
        """What follows each prompt, up to its first stop string, the end of text or `max_new_tokens`.

        The first tokens of a prompt that leaves no room for so many are left out. Raises ValueError for a
        wish that leaves no room for any prompt.
        """
        found: dict[int, str] = {}
        ids = self.tokenizer.encode_batch([prompt for prompt, _ in prompts])
        with progress("completions", len(prompts), "texts") as advance:
            for wish in dict.fromkeys(wish for _, wish in prompts):
                room = self._room(wish)
                rows = {
                    place: ids[place].tolist()[-room:]
                    for place, (_, own) in enumerate(prompts)
                    if own == wish
                }
                for first_row, places in _batches(rows, wish.max_new_tokens):
                    texts = self._complete([rows[place] for place in places], wish, first_row)
                    found |= zip(places, texts, strict=True)
                    advance(len(places))
        return [found[place] for place in range(len(prompts))]

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
        """Each as ids. Blanks that end a context belong to the token that begins the continuation."""
        contexts = self.tokenizer.encode_batch([context.rstrip() for context, _ in pairs])
        wholes = self.tokenizer.encode_batch([context + continuation for context, continuation in pairs])
        for context, whole in zip(contexts, wholes, strict=True):
            yield context.tolist() or [self.tokenizer.end_of_text], whole[len(context) :].tolist()

    def _judge(self, passages: Sequence[Passage]) -> list[Scored]:
        """All of them, with a bar. A passage of which nothing is judged takes no nats."""
        found = [NOTHING] * len(passages)
        judged = [place for place, passage in enumerate(passages) if passage.scored]
        asked = [passages[place] for place in judged]
        with progress("likelihoods", len(asked), "rows") as advance:
            for place, scored in judge_passages(self.model, asked, self.precision):
                found[judged[place]] = scored
                advance()
        return found

    def _room(self, wish: Wish) -> int:
        """How many ids a prompt may have."""
        room = self.model.config.context_length - wish.max_new_tokens
        if room < 1:
            raise ValueError(
                f"a completion of {wish.max_new_tokens:,} tokens leaves no room for a prompt in the model's "
                f"context of {self.model.config.context_length:,}: leave this task out"
            )
        return room

    def _complete(self, rows: Sequence[list[int]], wish: Wish, first_row: int) -> list[str]:
        """The text that follows each row of ids, all written at once."""
        decoding = Decoding(
            max_new_tokens=wish.max_new_tokens,
            sampling=wish.sampling,
            end_of_text=self.tokenizer.end_of_text,
            vocab_size=self.tokenizer.vocab_size,
            first_row=first_row,
        )
        writers = [TextWriter(self.tokenizer, wish.stop) for _ in rows]
        texts = ["" for _ in rows]

        def ends(row: int, token: int) -> bool:
            texts[row] += writers[row].write(token)
            return writers[row].stopped

        with autocast(self.model.wte.weight.device.type, self.precision):
            for _ in stream_ids(self.model, rows, decoding, ends):
                pass
        return [text + writer.finish() for text, writer in zip(texts, writers, strict=True)]


def _batches(rows: Mapping[int, Sequence[int]], new: int) -> Iterator[tuple[int, list[int]]]:
    """Places of rows about as long, TOKENS_AT_ONCE together at most, and how many rows came before them."""
    order = sorted(rows, key=lambda place: (-len(rows[place]), place))
    first = 0
    while first < len(order):
        fitting = max(1, TOKENS_AT_ONCE // (len(rows[order[first]]) + new))
        yield first, order[first : first + fitting]
        first += fitting
