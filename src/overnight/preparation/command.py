"""`overnight prepare`: a source becomes a folder of shards, and a summary of what is in it."""

from __future__ import annotations

import time

from overnight.data.shards import Manifest, read_manifest
from overnight.data.text_files import describe_files
from overnight.preparation.prepare import prepare_folder
from overnight.preparation.prepare_config import PrepareConfig
from overnight.terminal import byte_size, echo, shell_command

FEWEST_HELD_OUT, FEWEST_HELD_OUT_TOKENS = 8, 10_000  # documents and tokens that a loss is measured on


def run(config: PrepareConfig) -> Manifest | None:
    """Prepare the output folder, or verify and reuse it, and print a summary; None if Slurm does the work."""
    started_at = time.perf_counter()
    folder = prepare_folder(config)
    if folder is None:
        return None
    manifest = read_manifest(folder)
    for line in summarize_prepared(manifest):
        echo(line)
    echo(f"{folder} is ready after {time.perf_counter() - started_at:.1f} s")
    echo(f"next: {shell_command('train', 'RECIPE', '--data', folder)}")
    return manifest


def describe_reading(manifest: Manifest) -> list[str]:
    """The kinds of file that were read, and those that were left alone."""
    lines = []
    if manifest.files_read:
        lines.append(f"read: {describe_files(manifest.files_read)}")
    if left := manifest.files_left_alone:
        lines.append(f"left alone: {describe_files(left)}")
        if any(kind.startswith((".csv", ".tsv")) for kind in left):
            lines.append("a table of .csv or .tsv is read once it is saved as JSON lines or Parquet")
    return lines


def summarize_prepared(manifest: Manifest) -> list[str]:
    """A summary of a prepared folder, in a few lines."""
    train, validation = manifest.tokens("train"), manifest.tokens("validation")
    tokens = train + validation
    text_bytes = manifest.text_bytes("train") + manifest.text_bytes("validation")
    lines = [
        f"{manifest.source} (licence: {manifest.licence}), tokenizer {manifest.tokenizer}",
        f"{manifest.documents:,} documents, {byte_size(text_bytes)} of text, {tokens:,} tokens",
        f"{tokens / manifest.documents:,.1f} tokens per document, {text_bytes / tokens:.3f} bytes per token",
        f"{train:,} tokens to train on, {validation:,} held out ({validation / tokens:.2%})",
    ]
    held_out = sum(shard.documents for shard in manifest.validation)
    if held_out < FEWEST_HELD_OUT or validation < FEWEST_HELD_OUT_TOKENS:
        lines.append(
            f"only {held_out:,} documents with {validation:,} tokens are held out: a loss on them is "
            "uncertain; give more text, or a larger --validation-fraction"
        )
    lines += describe_reading(manifest)
    left_out = {
        "duplicates": manifest.duplicate_documents,
        "near-duplicates": manifest.near_duplicate_documents,
        "empty": manifest.empty_documents,
        "not valid text": manifest.skipped_documents,
        "damaged files": manifest.damaged_files,
    }
    if counts := ", ".join(f"{name} {count:,}" for name, count in left_out.items() if count):
        lines.append(f"left out: {counts}")
    if shared := manifest.contaminated_documents:
        found = ", ".join(f"{name} {count:,} documents" for name, count in shared.items())
        dropped = manifest.request.get("on_contaminated") == "drop"
        lines.append(f"contaminated: {found} ({'left out' if dropped else 'reported, kept'})")
    if manifest.repaired_documents:
        lines.append(f"repaired: {manifest.repaired_documents:,} documents hold U+FFFD for invalid bytes")
    return lines
