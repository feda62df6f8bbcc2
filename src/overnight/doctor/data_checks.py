"""Is the text what it should be? Shards, tokenizer, boundaries, held-out text, benchmarks, rows."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from overnight.data import shards
from overnight.data.shards import SPLITS, Manifest, Shard, Tokens, open_tokens, places_of
from overnight.doctor.check import CheckResult, SetUp
from overnight.inspection import statistics
from overnight.preparation import decontaminate
from overnight.tokenizer.tokenizer import Tokenizer

READ_TOKENS = 250_000_000  # of shards verified, counted and compared where a look at all was not asked for
SPELT_DOCUMENTS = 50
SEARCHED_DOCUMENTS = 2_000
LONGEST_TOKENS = 20_000  # of a document that is token_bytes
SHOWN_BOUNDARIES, SHOWN_CHARACTERS = 3, 32
ADOPTED = "from_shards"  # in the request of shards that another program wrote
PASSES_AS_GOOD_AS_FRESH = 4  # Muennighoff et al. 2023, arXiv 2305.16264
MARK = "<|endoftext|>"
PREPARE_AGAIN = "delete the folder and prepare the text again"
Item = TypeVar("Item")


def check_shards(folder: Path, *, full: bool) -> CheckResult:
    """Every byte of the shards is as it was written; of very many tokens, of some shards of each split."""
    try:
        manifest = shards.read_manifest(folder)
        chosen = _choose(manifest, full=full)
        count = len(manifest.train) + len(manifest.validation)
        if len(chosen) == count:
            shards.verify(folder)
        for shard in chosen if len(chosen) < count else ():
            shards.verify_shard(folder, shard, manifest.vocab_size)
    except (ValueError, OSError) as error:
        return CheckResult(passed=False, measured="damaged", bound="as they were written", cause=str(error))
    tokens = sum(shard.tokens for shard in chosen)
    return CheckResult(
        passed=True,
        measured=f"{len(chosen)} of {count} shards" if len(chosen) < count else f"{count} shards",
        bound=f"every byte of {tokens:,} tokens",
        figures={"shards": len(chosen), "tokens": tokens},
    )


def check_tokenizer(folder: Path, manifest: Manifest) -> CheckResult:
    """The tokenizer beside the shards made them: it spells documents that it reads as the same ids again."""
    bound = "gives the shards' own ids"
    try:
        tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    except (ValueError, OSError) as error:
        cause = f"the wrong tokenizer lies beside the shards, and text would be nonsense: {error}"
        return CheckResult(passed=False, measured="another one", bound=bound, cause=cause)
    looked = same = 0
    for document in sample_documents(folder, manifest, "train", SPELT_DOCUMENTS):
        if document.size > LONGEST_TOKENS:
            continue
        ids = document.tolist()
        looked += 1
        same += _encode(tokenizer, tokenizer.decode_bytes(ids)) == ids
    return CheckResult(
        passed=same == looked and manifest.vocab_size == tokenizer.vocab_size,
        measured=f"{same} of {looked} documents",
        bound=bound,
        cause=f"the tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids) does not make of a document's "
        f"text the ids that the shards hold (a vocabulary of {manifest.vocab_size:,}): they were written "
        "with another one; prepare the text again with the tokenizer that is meant",
        figures={"documents": looked, "same": same, "vocab_size": tokenizer.vocab_size},
    )


def _encode(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The ids of a document's bytes; none if they are no text."""
    try:
        return tokenizer.encode(text.decode())
    except UnicodeDecodeError:
        return []


def check_boundaries(folder: Path, manifest: Manifest, *, full: bool) -> CheckResult:
    """Each document begins with the end-of-text id, which stands nowhere else; some boundaries are shown."""
    found = expected = doubled = 0
    faults: list[str] = []
    is_adopted = ADOPTED in manifest.request  # there, another program's text may begin within a document
    for shard in _choose(manifest, full=full):
        ids = open_tokens(folder / shard.name)
        places = places_of(manifest.end_of_text, ids)
        found, expected = found + places.size, expected + shard.documents
        doubled += int((np.diff(places) == 1).sum())
        is_first = shard in (manifest.train[:1] + manifest.validation[:1])
        if is_first and ids[0] != manifest.end_of_text and not is_adopted:
            faults.append(f"{shard.name} does not begin with end-of-text")
        if abs(places.size - shard.documents) > is_adopted:
            faults.append(
                f"{shard.name} has {places.size:,} end-of-text ids for its {shard.documents:,} documents"
            )
    if doubled:
        faults.insert(0, f"{doubled:,} times two end-of-text ids stand side by side")
    return CheckResult(
        passed=not faults,
        measured=f"{found:,} ids of end-of-text",
        bound=f"one before each of {expected:,} documents",
        cause=f"{'; '.join(faults[:3])}: documents run into one another, or are cut in the middle, "
        f"and the model learns that; {PREPARE_AGAIN}, and have nothing else write end-of-text",
        shown=tuple(show_boundaries(folder, manifest)),
        figures={"found": found, "documents": expected, "side_by_side": doubled},
    )


def show_boundaries(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The text around a few boundaries, each one line, spread over the first training shard."""
    try:
        tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    except (ValueError, OSError):
        return  # another check says so
    ids = open_tokens(folder / manifest.train[0].name)
    places = [int(place) for place in places_of(manifest.end_of_text, ids) if place]
    for place in _spread(places, SHOWN_BOUNDARIES):
        before = _spell(tokenizer, ids[max(0, place - SHOWN_CHARACTERS) : place], manifest.end_of_text)
        after = _spell(tokenizer, ids[place + 1 : place + 1 + SHOWN_CHARACTERS], manifest.end_of_text)
        yield f"{before[-SHOWN_CHARACTERS:]}{MARK}{after[:SHOWN_CHARACTERS]}"


def _spell(tokenizer: Tokenizer, ids: Tokens, end_of_text: int) -> str:
    """The text of ids, on one line: what a terminal would obey is seen as a sign."""
    parts = np.split(ids, np.flatnonzero(ids == end_of_text))
    texts = [tokenizer.decode(part[part != end_of_text].tolist()) for part in parts]
    one_line = MARK.join(texts).replace("\n", "⏎")
    return "".join(each if each.isprintable() else "·" for each in one_line)


def check_disjoint(folder: Path, manifest: Manifest, *, full: bool) -> CheckResult:
    """No held-out document is in the training text as well."""
    if not manifest.tokens("validation"):
        return CheckResult(
            passed=False,
            measured="nothing is held out",
            bound="some text",
            cause="without held-out text nobody can tell learning from memory: prepare the text again with "
            "--validation-fraction 0.01",
        )
    held_out = {
        digest: number for number, digest in enumerate(_digests(folder, manifest, "validation", full))
    }
    trained = 0
    shared: set[bytes] = set()
    for digest in _digests(folder, manifest, "train", full):
        trained += 1
        if digest in held_out:
            shared.add(digest)
    first = min((held_out[digest] for digest in shared), default=-1) + 1
    return CheckResult(
        passed=not shared,
        measured=f"{len(shared):,} of {len(held_out):,} documents",
        bound=f"0 are among {trained:,} to train on",
        cause=f"{len(shared):,} held-out documents are in the training text as well, the first of them "
        f"number {first:,}: a validation loss on them measures memory; the text was split before its "
        f"duplicates were taken out: {PREPARE_AGAIN} with `overnight prepare`, which splits by a hash of it",
        figures={"shared": len(shared), "validation_documents": len(held_out), "train_documents": trained},
    )


def _digests(folder: Path, manifest: Manifest, split: str, full: bool) -> Iterator[bytes]:
    """Of each document that is not empty, without its end-of-text id; of the first, if there are many."""
    documents = sum(shard.documents for shard in manifest.shards(split))
    share = READ_TOKENS / max(1, manifest.tokens(split))
    most = None if full or share >= 1 else max(1, int(share * documents))
    for pieces in statistics.documents_of(statistics.shard_spans(folder, manifest, split, most)):
        first, *others = pieces
        digest, size = hashlib.blake2b(digest_size=16), 0
        for piece in (first[1:] if first[0] == manifest.end_of_text else first, *others):
            digest.update(np.ascontiguousarray(piece).data)
            size += piece.size
        if size:
            yield digest.digest()


def check_contamination(
    folder: Path, manifest: Manifest, benchmarks: Sequence[str], *, full: bool
) -> CheckResult:
    """How many training documents share 13 words in a row with a benchmark's file."""
    files = decontaminate.benchmark_names(benchmarks)
    search = decontaminate.BenchmarkSearch(decontaminate.build_index(files))
    tokenizer = shards.load_prepared_tokenizer(folder, manifest)
    most = None if full else SEARCHED_DOCUMENTS
    found = dict.fromkeys(files, 0)
    looked = contaminated = 0
    documents = sample_documents(folder, manifest, "train", most)
    while batch := [tokenizer.decode(ids.tolist()) for ids in itertools.islice(documents, 500)]:
        bits = search.find(batch)
        looked += len(batch)
        contaminated += int(np.count_nonzero(bits))
        for number, name in enumerate(files):
            found[name] += int(((bits >> np.uint64(number)) & np.uint64(1)).sum())
    told = ", ".join(f"{count:,} with {name}" for name, count in found.items() if count)
    return CheckResult(
        passed=not contaminated,
        measured=f"{contaminated:,} of {looked:,} documents",
        bound=f"0 share {decontaminate.PASSAGE_WORDS} words in a row",
        cause=f"training documents share a passage with a benchmark ({told}), whose score would in part be "
        f"memory: prepare the text again with --decontaminate {' '.join(benchmarks)} --on-contaminated drop",
        figures={"documents": looked, "contaminated": contaminated} | found,
    )


def check_rows(setup: SetUp, run_tokens: int, text_tokens: int | None) -> CheckResult:
    """The rows that a step reads: each target is the id that follows, and every reading gives the same."""
    plan, batches = setup.training.plan, setup.training.data.batch
    rows = plan.micro_batch_size * plan.micro_batches(0)
    first, again, other = batches(0, rows), batches(0, rows), batches(rows, rows)
    faults = []
    if not bool((first.targets[:, :-1] == first.ids[:, 1:]).all()):
        faults.append("targets are not the ids that follow")
    if not bool((first.ids == again.ids).all() and (first.targets == again.targets).all()):
        faults.append("the same rows, read again, are other rows")
    if bool((first.ids == other.ids).all()):
        faults.append("the second step reads the rows of the first")
    highest = int(max(first.ids.max(), first.targets.max()))
    if highest >= setup.state.model.vocab_size:
        faults.append(f"the id {highest} is outside the vocabulary")
    passes = None if not text_tokens else run_tokens / text_tokens
    return CheckResult(
        passed=not faults,
        measured=f"{rows} rows read" if not faults else "wrong",
        bound="each target is the id that follows",
        cause=f"{'; '.join(faults)}: the model would learn another text; look at data/stream.py",
        shown=() if passes is None else tuple(_tell_passes(run_tokens, passes)),
        figures={"rows": rows} | ({} if passes is None else {"passes": passes}),
    )


def _tell_passes(run_tokens: int, passes: float) -> Iterator[str]:
    yield f"the run reads {run_tokens:,} tokens: its training text {passes:,.2f} times"
    if passes > PASSES_AS_GOOD_AS_FRESH:
        yield f"beyond {PASSES_AS_GOOD_AS_FRESH} times, text teaches less than fresh text (arXiv 2305.16264)"


def sample_documents(folder: Path, manifest: Manifest, split: str, most: int | None) -> Iterator[Tokens]:
    """The ids of whole documents without end-of-text: all, or at most so many, spread over the shards.

    Of a sample, none that goes on in the next shard; of text without boundaries, the beginning of each shard.
    """
    if most is None:
        for pieces in statistics.documents_of(statistics.shard_spans(folder, manifest, split, None)):
            ids = np.concatenate(pieces)
            yield ids[1:] if ids[0] == manifest.end_of_text else ids
        return
    all_shards = manifest.shards(split)
    chosen = _spread(all_shards, most)
    each = math.ceil(most / max(1, len(chosen)))
    for shard in chosen:
        ids = open_tokens(folder / shard.name)
        starts = places_of(manifest.end_of_text, ids).tolist()
        edges = [*starts, ids.size] if shard == all_shards[-1] else starts
        pairs = list(itertools.pairwise(edges)) or [(-1, min(ids.size, LONGEST_TOKENS))]
        for begin, end in _spread(pairs, each):
            if end - begin > 1:
                yield ids[begin + 1 : end]


def _choose(manifest: Manifest, *, full: bool) -> tuple[Shard, ...]:
    """The shards to be read: all, or of very many tokens some of each split, first and last included."""
    total = sum(manifest.tokens(split) for split in SPLITS)
    if full or total <= READ_TOKENS:
        return manifest.train + manifest.validation
    average = total / (len(manifest.train) + len(manifest.validation))
    count = max(2, int(READ_TOKENS / average / 2))
    return (*_spread(manifest.train, count), *_spread(manifest.validation, count))


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[number * (len(items) - 1) // (count - 1)] for number in range(count)]
