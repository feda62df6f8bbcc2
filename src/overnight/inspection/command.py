"""The command `overnight inspect`: what is in prepared shards, or which sites a source comes from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from overnight.config import raise_problems
from overnight.data.text_files import is_remote
from overnight.inspection import InspectConfig
from overnight.inspection.domains import Columns, Domains, count_domains
from overnight.inspection.quality import ODDITIES
from overnight.inspection.statistics import LONGEST_LOOK_TOKENS, Inspection, Sample, inspect_shards
from overnight.terminal import echo

WIDTH = 80
BAR = 30
SHARDS_SHOWN = 12
DOMAINS_SHOWN = 20


def run(config: InspectConfig) -> None:
    """Look at the data and say what is there. Raises ValueError for what is neither shards nor a source."""
    raise_problems(config.problems(), "inspect")
    if (Path(config.data) / "manifest.json").is_file():
        found = inspect_shards(
            Path(config.data), documents=config.documents, samples=config.samples, seed=config.seed
        )
        _print(config, found, describe_shards(found))
        return
    _refuse_foreign(config.data)
    domains = count_domains(
        config.data, Columns(url=config.url_column, text=config.text_column), config.documents
    )
    _print(config, domains, describe_domains(domains))


def _print(config: InspectConfig, found: Inspection | Domains, lines: Iterator[str]) -> None:
    if config.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
        return
    for line in lines:
        echo(line)


def _refuse_foreign(data: str) -> None:
    """Raise ValueError for what is neither there nor a source of text."""
    path = Path(data)
    if is_remote(data):
        return
    if not path.exists():
        raise ValueError(
            f"there is no folder or file {data}; give a folder that `overnight prepare` wrote, or a source"
        )
    if path.is_dir() and any(path.glob("*.bin")) | any(path.glob("*.npy")):
        raise ValueError(
            f"{data} has no manifest.json: if another program wrote these shards, adopt them first, with "
            f"`overnight prepare --from-shards {data}`; if `overnight prepare` did, it has not finished"
        )


# ---------------------------------------------------------------- prepared shards


def describe_shards(found: Inspection) -> Iterator[str]:
    """The whole inspection in lines of at most 80 columns."""
    yield from _wrapped(
        f"{found.folder}: {found.source} (licence: {found.licence}) in ids of {found.tokenizer}"
    )
    yield "every shard is as its manifest says"
    for problem in found.problems:
        yield from _wrapped(f"! {problem}", indent="  ")
    if found.duplicates == type(found.duplicates)(
        train=0, validation=0, validation_in_train=0, first_in_both=None
    ):
        yield "no document is there twice, within a split or across both"
    if found.first_documents_only is not None:
        yield from _wrapped(
            f"looked at the first {found.first_documents_only:,} documents of each split only; "
            "all that follows is of those"
        )
    yield ""
    yield from _counts_table(found)
    yield ""
    yield from _histogram(found)
    yield ""
    yield from _frequent(found)
    yield ""
    yield from _oddities(found)
    for sample in found.samples:
        yield ""
        yield from _shown_sample(sample)
    yield ""
    yield "top domains: none, for shards hold no addresses; name the source instead"
    yield f"next: overnight train RECIPE --data {found.folder}"


def _counts_table(found: Inspection) -> Iterator[str]:
    yield f"{'':<18} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'B/tok.':>6} {'tok./doc.':>10}"
    for split in found.splits:
        yield _counts_row(split.split, split.documents, split.tokens, split.text_bytes)
        for shard in split.shards[:SHARDS_SHOWN] if len(split.shards) > 1 else ():
            yield _counts_row(
                f"  {shard.name.removesuffix('.bin')}", shard.documents, shard.tokens, shard.text_bytes
            )
        if (more := len(split.shards) - SHARDS_SHOWN) > 0:
            yield f"  and {more:,} shards more (--json tells all)"


def _counts_row(name: str, documents: int, tokens: int, text_bytes: int) -> str:
    per_token = f"{text_bytes / tokens:.3f}" if tokens else "–"
    average = tokens / documents if documents else 0.0
    per_document = f"{average:,.0f}" if average >= 1e5 else f"{average:,.1f}"
    return f"{name:<18} {documents:>11,} {tokens:>15,} {text_bytes:>15,} {per_token:>6} {per_document:>10}"


def _histogram(found: Inspection) -> Iterator[str]:
    lengths = found.lengths
    yield from _wrapped(
        f"tokens per document (its end-of-text id included): mean {lengths.mean:,.1f}, median "
        f"{lengths.median:,}, 90% up to {lengths.percentile_90:,}, from {lengths.shortest:,} to "
        f"{lengths.longest:,}"
    )
    documents = sum(bucket.documents for bucket in lengths.histogram)
    most = max(bucket.documents for bucket in lengths.histogram)
    for bucket in lengths.histogram:
        bar = "█" * -(-BAR * bucket.documents // most)
        span = f"{bucket.shortest:,}–{bucket.longest:,}" if bucket.longest > 1 else "1"
        yield f"{span:>21} {bucket.documents:>11,} {bucket.documents / documents:>7.2%}  {bar}".rstrip()


def _frequent(found: Inspection) -> Iterator[str]:
    tokens = sum(split.tokens for split in found.splits)
    spelled = [repr(one.text).replace(r"\\x", r"\x") for one in found.frequent]  # bytes that are no character
    shown = [f"{text} {one.count / tokens:.2%}" for text, one in zip(spelled, found.frequent, strict=True)]
    yield f"{found.ids_used:,} of {found.vocab_size:,} ids occur, most often"
    yield from _wrapped("   ".join(each.replace(" ", "\ue000") for each in shown), indent="  ", first="  ")


def _oddities(found: Inspection) -> Iterator[str]:
    documents = sum(split.documents for split in found.splits)
    which = (
        f"all {documents:,} documents"
        if found.sampled_documents >= documents
        else f"{found.sampled_documents:,} documents spread evenly over the {documents:,}"
    )
    yield from _wrapped(f"of {which} (read up to {LONGEST_LOOK_TOKENS:,} tokens each)")
    sampled = max(1, found.sampled_documents)
    for name, count in found.oddities.items():
        yield f"{count:>10,} {count / sampled:>7.2%}  {ODDITIES[name]}"
    share = found.not_english_looking / sampled
    yield f"{found.not_english_looking:>10,} {share:>7.2%}  are not English-looking: one of the last two"


def _shown_sample(sample: Sample) -> Iterator[str]:
    yield f"document {sample.document:,} of {sample.split} ({sample.tokens:,} tokens)"
    text = " ".join(_visible(sample.text).split())
    yield from _wrapped(text + (" …" if sample.is_shortened else ""), indent="  ", first="  ")


# ---------------------------------------------------------------- a source


def describe_domains(found: Domains) -> Iterator[str]:
    """The top domains in lines of at most 80 columns."""
    yield from _wrapped(
        f"{found.source}: {found.documents:,} documents, {found.text_bytes / 1e6:,.2f} MB of text, "
        f"from {found.sites:,} sites"
    )
    if found.documents_without:
        share = found.documents_without / found.documents
        yield f"{found.documents_without:,} documents ({share:.2%}) name no site"
    yield ""
    yield f"{'site':<40} {'documents':>11} {'share':>7} {'MB':>10} {'share':>7}"
    for domain in found.top[:DOMAINS_SHOWN]:
        name = _visible(domain.name)
        name = name if len(name) <= 40 else name[:39] + "…"
        of_documents, of_bytes = (
            domain.documents / found.documents,
            domain.text_bytes / max(1, found.text_bytes),
        )
        yield (
            f"{name:<40} {domain.documents:>11,} {of_documents:>7.2%} "
            f"{domain.text_bytes / 1e6:>10,.2f} {of_bytes:>7.2%}"
        )
    if (more := found.sites - DOMAINS_SHOWN) > 0:
        yield f"and {more:,} sites more"
    yield ""
    yield f"next: overnight prepare {found.source}"


# ---------------------------------------------------------------- lines


def _wrapped(text: str, indent: str = "", first: str = "") -> list[str]:
    r"""Lines of at most 80 columns, wide characters counted as two; none ends at a blank written "\ue000"."""
    console = Console(width=WIDTH)
    lines = Text(text).wrap(console, WIDTH - max(len(indent), len(first)))
    starts = [first, *[indent] * len(lines)]
    return [
        (start + line.plain.rstrip()).replace("\ue000", " ")
        for start, line in zip(starts, lines, strict=False)
    ]


def _visible(text: str) -> str:
    """The text with U+FFFD for what a terminal would obey rather than show."""
    return "".join(
        character if character.isprintable() or character in "\n\t\r" else "\ufffd" for character in text
    )
