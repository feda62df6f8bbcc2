"""The command `overnight inspect`: prepared shards, the sites of a source, or a model's folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from overnight.config import raise_problems
from overnight.data.shards import MANIFEST
from overnight.data.text_files import describe_files, is_remote
from overnight.inspection import InspectConfig
from overnight.inspection.domains import Domains, count_domains
from overnight.inspection.quality import ODDITIES
from overnight.inspection.statistics import LONGEST_LOOK_TOKENS, Inspection, Row, inspect_shards
from overnight.terminal import NO_BREAK, byte_size, echo, shell_command

WIDTH = 80
BAR_WIDTH = 30
SHARDS_SHOWN = 12
DOMAINS_SHOWN = 20


def run(config: InspectConfig) -> None:
    """Print the contents. Raises ValueError for what is neither shards, nor text, nor a model."""
    raise_problems(config.problems(), "inspect")
    folder = Path(config.data)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        from overnight.inspection.model_folder import print_model  # needs torch, unlike all others

        print_model(folder, as_json=config.json)
        return
    found: Inspection | Domains
    if (folder / MANIFEST).is_file():
        found = inspect_shards(folder, documents=config.documents, samples=config.samples, seed=config.seed)
    else:
        _require_source(config.data)
        found = count_domains(config.data, (config.url_column, config.text_column), config.documents)
    if config.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
        return
    for line in describe(found):
        echo(line)


def _require_source(data: str) -> None:
    """Raise ValueError if `data` is missing, or holds shards of another program."""
    path = Path(data)
    if is_remote(data):
        return
    if not path.exists():
        raise ValueError(
            f"{data} is neither a folder nor a file: give a folder of `overnight prepare`, or a source"
        )
    if path.is_dir() and any(path.glob("*.bin")) | any(path.glob("*.npy")):
        raise ValueError(
            f"{data} has no {MANIFEST}: if another program wrote these shards, import them first, with "
            f"`{shell_command('prepare', '--from-shards', data)}`; if `overnight prepare` did, it has not "
            "finished"
        )


def describe(found: Inspection | Domains) -> Iterator[str]:
    """All results, in lines of at most 80 columns; wide characters count as two."""
    for line in _describe_shards(found) if isinstance(found, Inspection) else _describe_domains(found):
        indent = " " * (len(line) - len(line.lstrip()))
        if line.startswith("next: "):
            yield line  # a command is never broken
            continue
        parts = Text(line.lstrip()).wrap(Console(width=WIDTH), WIDTH - len(indent))
        yield from (indent + part.plain.rstrip().replace(NO_BREAK, " ") for part in parts or [Text()])


# Prepared shards


def _describe_shards(found: Inspection) -> Iterator[str]:
    yield f"{found.folder}: {found.source} (licence: {found.licence}), tokenizer {found.tokenizer}"
    yield "every shard matches the manifest"
    yield from (f"  ! {problem}" for problem in found.problems)
    if found.files_read:
        yield f"read: {describe_files(found.files_read)}"
    if found.files_left_alone:
        yield f"left alone: {describe_files(found.files_left_alone)}"
    duplicates = found.duplicates
    if not duplicates.train and not duplicates.validation and not duplicates.validation_in_train:
        yield "no document occurs twice, within a split or across splits"
    if found.first_documents_only is not None:
        yield (
            f"only the first {found.first_documents_only:,} documents of each split were inspected; "
            "all figures below are for these"
        )
    for section in (_counts(found), _histogram(found), _frequent(found), _oddities(found)):
        yield ""
        yield from section
    for sample in found.samples:
        yield ""
        yield f"document {sample['document']:,} of {sample['split']} ({sample['tokens']:,} tokens)"
        yield "  " + " ".join(_printable(sample["text"]).split()) + (" …" if sample["is_shortened"] else "")
    yield ""
    yield "top domains: not known from shards, which contain no addresses; inspect the source instead"
    yield f"next: {shell_command('train', 'RECIPE', '--data', found.folder)}"


def _counts(found: Inspection) -> Iterator[str]:
    yield f"{'':<18} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'B/tok.':>6} {'tok./doc.':>10}"
    for split in found.splits:
        yield _counts_row(split.split, vars(split))
        for shard in split.shards[:SHARDS_SHOWN] if len(split.shards) > 1 else ():
            yield _counts_row(f"  {shard['name'].removesuffix('.bin')}", shard)
        if (more := len(split.shards) - SHARDS_SHOWN) > 0:
            yield f"  and {more:,} shards more (--json lists all)"


def _counts_row(name: str, counts: Row) -> str:
    documents, tokens, text_bytes = (counts[each] for each in ("documents", "tokens", "text_bytes"))
    per_token = f"{text_bytes / tokens:.3f}" if tokens else "–"
    average = tokens / documents if documents else 0.0
    per_document = f"{average:,.0f}" if average >= 1e5 else f"{average:,.1f}"
    return f"{name:<18} {documents:>11,} {tokens:>15,} {text_bytes:>15,} {per_token:>6} {per_document:>10}"


def _histogram(found: Inspection) -> Iterator[str]:
    lengths = found.lengths
    yield (
        f"tokens per document (its end-of-text id included): mean {lengths.mean:,.1f}, median "
        f"{lengths.median:,}, 90% up to {lengths.percentile_90:,}, from {lengths.shortest:,} to "
        f"{lengths.longest:,}"
    )
    counts = [bucket["documents"] for bucket in lengths.histogram]
    for bucket, count in zip(lengths.histogram, counts, strict=True):
        bar = "█" * -(-BAR_WIDTH * count // max(counts))  # rounded up: every document shows
        span = f"{bucket['shortest']:,}–{bucket['longest']:,}" if bucket["longest"] > 1 else "1"
        yield f"{span:>21} {count:>11,} {count / sum(counts):>7.2%}  {bar}"


def _frequent(found: Inspection) -> Iterator[str]:
    tokens = sum(split.tokens for split in found.splits)
    shown = [
        # repr shows blanks and line ends; bytes of incomplete characters are escaped already.
        f"{token['text']!r} {token['count'] / tokens:.2%}".replace(r"\\x", r"\x").replace(" ", NO_BREAK)
        for token in found.frequent
    ]
    yield f"{found.ids_used:,} of {found.vocab_size:,} ids occur, most often"
    yield "  " + "   ".join(shown)


def _oddities(found: Inspection) -> Iterator[str]:
    documents, sampled = sum(split.documents for split in found.splits), found.sampled_documents
    which = f"all {documents:,} documents"
    if sampled < documents:
        which = f"{sampled:,} documents spread evenly over the {documents:,}"
    yield f"of {which} (read up to {LONGEST_LOOK_TOKENS:,} tokens each)"
    counts = {ODDITIES[name]: count for name, count in found.oddities.items()}
    counts["are not English-looking: one of the last two"] = found.not_english_looking
    for what, count in counts.items():
        yield f"{count:>10,} {count / max(1, sampled):>7.2%}  {what}"


# A source


def _describe_domains(found: Domains) -> Iterator[str]:
    yield (
        f"{found.source}: {found.documents:,} documents, {byte_size(found.text_bytes)} of text, "
        f"from {found.sites:,} sites"
    )
    if found.documents_without:
        share = found.documents_without / found.documents
        yield f"{found.documents_without:,} documents ({share:.2%}) have no site"
    yield ""
    yield f"{'site':<40} {'documents':>11} {'share':>7} {'MB':>10} {'share':>7}"
    for domain in found.top[:DOMAINS_SHOWN]:
        name, documents, text_bytes = _printable(domain["name"]), domain["documents"], domain["text_bytes"]
        name = name if len(name) <= 40 else name[:39] + "…"
        shares = documents / found.documents, text_bytes / max(1, found.text_bytes)
        yield f"{name:<40} {documents:>11,} {shares[0]:>7.2%} {text_bytes / 1e6:>10,.2f} {shares[1]:>7.2%}"
    if (more := found.sites - DOMAINS_SHOWN) > 0:
        yield f"and {more:,} sites more"
    yield ""
    yield f"next: {shell_command('prepare', found.source)}"


def _printable(text: str) -> str:
    """The text with U+FFFD for what a terminal would execute rather than show."""
    return "".join(char if char.isprintable() or char in "\n\t\r" else "\ufffd" for char in text)
