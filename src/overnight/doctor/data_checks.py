"""Checks of the text: shards, tokenizer, document boundaries, held-out text, benchmarks, rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from overnight.data import shards
from overnight.data.shards import SPLITS, Manifest, Shard, Tokens, open_tokens, places_of
from overnight.data.token_reader import (
    DOCUMENT_HASH_BYTES,
    content_of,
    documents_of,
    hash_document,
    shard_spans,
)
from overnight.doctor import DoctorConfig
from overnight.doctor.check import CheckResult, skipped
from overnight.doctor.context import DoctorContext
from overnight.inspection.statistics import count_duplicates
from overnight.options import as_option
from overnight.preparation import decontaminate
from overnight.terminal import join_words

READ_TOKENS = 250_000_000  # of shards that are checked without --full
ENCODED_DOCUMENTS = 50
SEARCHED_DOCUMENTS = 2_000
LONGEST_TOKENS = 20_000  # of a document that is encoded again
SHOWN_BOUNDARIES, SHOWN_CHARACTERS = 3, 32
IMPORTED = "from_shards"  # key in the request of imported shards
USEFUL_PASSES = 4  # Muennighoff et al. 2023, arXiv 2305.16264
MARK = "<|endoftext|>"
PREPARE_AGAIN = "delete the folder and prepare the text again"
Item = TypeVar("Item")
TextCheck = Callable[[Path, Manifest, DoctorConfig], CheckResult]


def of_each_text(check: TextCheck) -> Callable[[DoctorContext], CheckResult]:
    """Apply `check` to all prepared texts; returns the first failure, or else the first result."""

    @functools.wraps(check)
    def check_all(context: DoctorContext) -> CheckResult:
        results = []
        for folder in context.folders:
            result = check(folder, shards.read_manifest(folder), context.config)
            if result.passed is False:
                return dataclasses.replace(result, cause=f"{folder}: {result.cause}")
            results.append(result)
        return results[0] if results else skipped("there are no shards here to check")

    return check_all


def check_shards(context: DoctorContext) -> CheckResult:
    """Every byte of the shards matches the manifest; without `full`, of a sample of each split's shards."""
    return _verify_shards(context) if context.folders else skipped("; ".join(context.missing))


@of_each_text
def _verify_shards(folder: Path, manifest: Manifest, config: DoctorConfig) -> CheckResult:
    chosen, count = _choose(manifest, full=config.full), len(manifest.shards())
    if len(chosen) == count:
        shards.verify(folder)
    else:
        for shard in chosen:
            shards.verify_shard(folder, shard, manifest.vocab_size)
    tokens = sum(shard.tokens for shard in chosen)
    return CheckResult(
        passed=True,
        measured=f"{len(chosen)} of {count} shards" if len(chosen) < count else f"{count} shards",
        bound=f"every byte of {tokens:,} tokens",
        figures={"shards": len(chosen), "tokens": tokens},
    )


@of_each_text
def check_tokenizer(folder: Path, manifest: Manifest, _config: DoctorConfig) -> CheckResult:
    """The tokenizer in the folder encodes documents of the shards to the same ids."""
    tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    documents = sample_training_documents(folder, manifest, ENCODED_DOCUMENTS)
    all_ids = [document.tolist() for document in documents if document.size <= LONGEST_TOKENS]
    encoded, same = len(all_ids), sum(tokenizer.encode(tokenizer.decode(ids)) == ids for ids in all_ids)
    return CheckResult(
        passed=same == encoded and manifest.vocab_size == tokenizer.vocab_size,
        measured=f"{same} of {encoded} documents",
        bound="gives the shards' own ids",
        cause=f"the tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids) encodes documents to other ids "
        f"than the shards (a vocabulary of {manifest.vocab_size:,}): they were written with another one; "
        "prepare the text again with the right tokenizer",
        figures={"documents": encoded, "same": same, "vocab_size": tokenizer.vocab_size},
    )


@of_each_text
def check_boundaries(folder: Path, manifest: Manifest, config: DoctorConfig) -> CheckResult:
    """Every document begins with the end-of-text id, which occurs nowhere else. Shows some boundaries."""
    found = expected = doubled = 0
    faults: list[str] = []
    is_imported = IMPORTED in manifest.request  # another program's shards may begin within a document
    for shard in _choose(manifest, full=config.full):
        ids = open_tokens(folder / shard.name)
        places = places_of(manifest.end_of_text, ids)
        found, expected = found + places.size, expected + shard.documents
        doubled += int((np.diff(places) == 1).sum())
        is_first = shard in (manifest.train[:1] + manifest.validation[:1])
        if is_first and ids[0] != manifest.end_of_text and not is_imported:
            faults.append(f"{shard.name} does not begin with end-of-text")
        if abs(places.size - shard.documents) > is_imported:
            faults.append(
                f"{shard.name} has {places.size:,} end-of-text ids for its {shard.documents:,} documents"
            )
    if doubled:
        faults.insert(0, f"{doubled:,} pairs of end-of-text ids in a row")
    return CheckResult(
        passed=not faults,
        measured=f"{found:,} ids of end-of-text",
        bound=f"one before each of {expected:,} documents",
        cause=f"{'; '.join(faults[:3])}: documents are joined or cut, and the model learns that; "
        f"{PREPARE_AGAIN}, without end-of-text in the text itself",
        shown=tuple(show_boundaries(folder, manifest)),
        figures={"found": found, "documents": expected, "side_by_side": doubled},
    )


def show_boundaries(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The text around a few boundaries of the first training shard, one line each."""
    try:
        tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    except (ValueError, OSError):
        return  # the check of the tokenizer reports it
    ids = open_tokens(folder / manifest.train[0].name)
    documents = [part for part in np.split(ids, places_of(manifest.end_of_text, ids)) if part.size]
    for before, after in _spread(list(itertools.pairwise(documents)), SHOWN_BOUNDARIES):
        ends = before[1:][-SHOWN_CHARACTERS:], after[1:][:SHOWN_CHARACTERS]
        left, right = (_one_line(tokenizer.decode(each.tolist())) for each in ends)
        yield f"{left[-SHOWN_CHARACTERS:]}{MARK}{right[:SHOWN_CHARACTERS]}"


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else "·" for each in text.replace("\n", "⏎"))


@of_each_text
def check_disjoint(folder: Path, manifest: Manifest, config: DoctorConfig) -> CheckResult:
    """No held-out document is in the training text."""
    if not manifest.tokens("validation"):
        return CheckResult(
            passed=False,
            measured="nothing held out",
            bound="some text",
            cause="without held-out text, learning looks the same as memorizing: prepare the text again with "
            "--validation-fraction 0.01",
        )
    digests = [_digests(folder, manifest, split, full=config.full) for split in SPLITS]
    train, held_out = (len(each) // DOCUMENT_HASH_BYTES for each in digests)
    found = count_duplicates(*digests)
    shared, first = found.validation_in_train, (found.first_in_both or 0) + 1
    return CheckResult(
        passed=not shared,
        measured=f"{shared:,} of {held_out:,} documents",
        bound=f"0 are among {train:,} to train on",
        cause=f"{shared:,} held-out documents are in the training text as well, the first is number "
        f"{first:,}: the validation loss on them measures memorizing; the text was split before duplicates "
        f"were removed: {PREPARE_AGAIN} with `overnight prepare`, which splits by a hash of the text",
        figures={"shared": shared, "validation_documents": held_out, "train_documents": train},
    )


def _digests(folder: Path, manifest: Manifest, split: str, *, full: bool) -> bytearray:
    """Hashes of all documents that are not empty, end to end; without `full`, of the first ones."""
    documents = sum(shard.documents for shard in manifest.shards(split))
    share = READ_TOKENS / max(1, manifest.tokens(split))
    most = None if full or share >= 1 else max(1, int(share * documents))
    digests = bytearray()
    for pieces in documents_of(shard_spans(folder, manifest, split, most)):
        content = content_of(pieces, manifest.end_of_text)
        if any(piece.size for piece in content):
            digests += hash_document(content).digest()
    return digests


@of_each_text
def check_contamination(folder: Path, manifest: Manifest, config: DoctorConfig) -> CheckResult:
    """How many training documents share 13 words in a row with a benchmark's file."""
    if not config.benchmarks:
        return skipped("no benchmark file was given: --benchmarks FILE ...")
    files = decontaminate.benchmark_names(config.benchmarks)
    search = decontaminate.BenchmarkSearch(decontaminate.build_index(files))
    tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    most = None if config.full else SEARCHED_DOCUMENTS
    documents = sample_training_documents(folder, manifest, most)
    parts = [np.zeros(0, dtype=np.uint64)]  # for each document, one bit per benchmark
    while texts := [tokenizer.decode(ids.tolist()) for ids in itertools.islice(documents, 500)]:
        parts.append(search.find(texts))
    bits = np.concatenate(parts)
    searched, contaminated = bits.size, int(np.count_nonzero(bits))
    found = {name: int(np.count_nonzero(bits & np.uint64(1 << n))) for n, name in enumerate(files)}
    matches = ", ".join(f"{count:,} with {name}" for name, count in found.items() if count)
    return CheckResult(
        passed=not contaminated,
        measured=f"{contaminated:,} of {searched:,} documents",
        bound=f"0 share {decontaminate.PASSAGE_WORDS} words in a row",
        cause=f"training documents share a passage with a benchmark ({matches}), whose score would in part "
        "be memorized: prepare the text again with --on-contaminated drop "
        f"{join_words(as_option('decontaminate', config.benchmarks, tuple))}",
        figures={"documents": searched, "contaminated": contaminated} | found,
    )


def check_rows(context: DoctorContext) -> CheckResult:
    """The rows of a step: each target is the next id, and rows are the same each time they are read."""
    run = context.tiny_run.build()
    plan, data = run.training.plan, run.training.data
    rows = plan.micro_batch_size * plan.micro_batches(0)
    first, again, other = data.batch(0, rows), data.batch(0, rows), data.batch(rows, rows)
    faults = []
    if not bool((first.targets[:, :-1] == first.ids[:, 1:]).all()):
        faults.append("targets are not the next ids")
    if not bool((first.ids == again.ids).all() and (first.targets == again.targets).all()):
        faults.append("the same rows differ when read again")
    if bool((first.ids == other.ids).all()):
        faults.append("the second step reads the rows of the first")
    highest = int(max(first.ids.max(), first.targets.max()))
    if highest >= run.state.model.vocab_size:
        faults.append(f"the id {highest} is outside the vocabulary")
    shown: list[str] = []
    figures: dict[str, float] = {"rows": rows}
    if context.text.tokens:
        resolved = context.plan.resolved
        run_tokens = resolved.plan.tokens_before(resolved.total_steps)
        passes = run_tokens / (context.text.tokens - (context.text.validation_tokens or 0))
        figures["passes"] = passes
        shown = [f"the run reads {run_tokens:,} tokens: {passes:,.2f} passes over its training text"]
        if passes > USEFUL_PASSES:
            shown.append(
                f"after {USEFUL_PASSES} passes, repeated text is worth less than new text (arXiv 2305.16264)"
            )
    return CheckResult(
        passed=not faults,
        measured=f"{rows} rows read" if not faults else "wrong",
        bound="each target is the next id",
        cause=f"{'; '.join(faults)}: the model would learn a different text; look at data/loader.py",
        shown=tuple(shown),
        figures=figures,
    )


def sample_training_documents(folder: Path, manifest: Manifest, most: int | None) -> Iterator[Tokens]:
    """The ids of whole documents without end-of-text: all, or at most `most`, spread over the shards.

    A sample has no documents that continue in the next shard; of text without boundaries, it has the
    beginning of each shard.
    """
    if most is None:
        for pieces in documents_of(shard_spans(folder, manifest, "train", None)):
            yield np.concatenate(content_of(pieces, manifest.end_of_text))
        return
    chosen = _spread(manifest.train, most)
    each = math.ceil(most / max(1, len(chosen)))
    for shard in chosen:
        ids = open_tokens(folder / shard.name)
        starts = places_of(manifest.end_of_text, ids).tolist()
        edges = [*starts, ids.size] if shard == manifest.train[-1] else starts
        pairs = list(itertools.pairwise(edges)) or [(-1, min(ids.size, LONGEST_TOKENS))]
        for begin, end in _spread(pairs, each):
            if end - begin > 1:
                yield ids[begin + 1 : end]


def _choose(manifest: Manifest, *, full: bool) -> tuple[Shard, ...]:
    """The shards to read: all or, without `full`, some of each split, including the first and the last."""
    every = manifest.shards()
    total = sum(shard.tokens for shard in every)
    if full or total <= READ_TOKENS:
        return every
    count = max(2, int(READ_TOKENS * len(every) / total / 2))
    return (*_spread(manifest.train, count), *_spread(manifest.validation, count))


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items at equal distances, including the first and the last."""
    count = min(count, len(items))
    return [items[number * (len(items) - 1) // max(1, count - 1)] for number in range(count)]
