"""The identity of prepared data, and the folder that holds it.

The identity is the request: everything that decides the bytes of the shards, among it the hash of the text.
The manifest records it. A folder has a readable name, data/NAME; if that folder holds data of another
identity, the data goes to data/NAME-DIGEST. A folder of another identity is never used.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from overnight.data import DataConfig
from overnight.data.atomic_folder import staging_path
from overnight.data.shards import MANIFEST, is_being_prepared, read_manifest
from overnight.preparation.decontaminate import describe_benchmarks
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.preparation.prepare_state import Request, is_complete, read_state
from overnight.preparation.sources import Source, open_source, published_source
from overnight.terminal import echo
from overnight.tokenizer.open_tokenizer import NAMES, load_tokenizer

SOURCE_HASH = "source_sha256"
DIGEST_DIGITS = 8


def text_request(path: str, config: DataConfig) -> PrepareConfig:
    """The options of `prepare` for one text of a recipe."""
    return PrepareConfig(
        source=path,
        tokenizer=config.tokenizer,
        validation_fraction=config.validation_fraction,
        near_duplicates=config.near_duplicates,
    )


def describe_request(config: PrepareConfig, source: Source) -> Request:
    """The identity of what `prepare(config)` makes of a source: the same on every machine."""
    tokenizer = config.tokenizer_name
    if tokenizer not in NAMES and not tokenizer.startswith("bpe-"):  # a path: its content counts
        tokenizer = f"{Path(tokenizer).name} {load_tokenizer(tokenizer).fingerprint}"
    fraction = config.validation_fraction
    request: Request = {
        "source": source.name,
        SOURCE_HASH: source.sha256,
        "text_column": config.text_column,
        "on_bad_text": config.on_bad_text,
        "on_bad_file": config.on_bad_file,
        "tokenizer": tokenizer,
        "validation_fraction": source.validation_fraction if fraction is None else fraction,
        "tokens": config.tokens,
        "shard_tokens": config.shard_tokens,
    }
    if config.subset is not None:
        request["subset"] = config.subset
    if config.benchmark_paths:
        request["decontaminate"] = describe_benchmarks(config.benchmark_paths)
        request["on_contaminated"] = config.on_contaminated
    if config.near_duplicates == "drop":
        request["near_duplicates"] = "drop"
    return request


def find_prepared(config: PrepareConfig, *, unfinished: bool = False) -> Path | None:
    """The folder of what `prepare(config)` would make; None if there is none yet.

    With `unfinished` also one that is being prepared. Every command finds the data of a text here. The text
    is read for its hash, but not that of a named source, whose text does not change: no network is needed.
    Raises ValueError if the source does not exist.
    """
    folders = [
        folder
        for folder in _possible_folders(config)
        if (folder / MANIFEST).is_file() or (unfinished and is_being_prepared(folder))
    ]
    if not folders:
        return None
    source = None if config.from_file else published_source(config.source or "", config.subset)
    if source is None:
        source = open_source(config.source or "", config.subset, config.from_file, config.text_column)
    request = describe_request(config, source)
    for folder in folders:
        try:
            if (held := held_request(folder)) is not None and not differences(held, request):
                return folder
        except ValueError:  # damaged: found again, and refused, when the text is to be prepared
            continue
    return None


def choose_folder(config: PrepareConfig, request: Request) -> Path:
    """The folder of this identity, or where it is to be prepared; says so if that is not the usual one.

    Raises ValueError, with all that differs, if `out` holds other data.
    """
    usual = output_folder(config)
    if config.out is not None:
        require_identity(usual, request)
        return usual
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:DIGEST_DIGITS]
    own, held = usual.with_name(f"{usual.name}-{digest}"), held_request(usual)
    found = [] if held is None else differences(held, request)
    if not found and (held is not None or held_request(own) is None):
        return usual
    require_identity(own, request)
    if found:
        echo(f"{usual} holds other data ({'; '.join(found)}): using {own} instead")
    return own


def require_identity(folder: Path, request: Request) -> None:
    """Raise ValueError, with all that differs, if a folder holds data of another identity."""
    held = held_request(folder)
    if held is not None and (found := differences(held, request)):
        raise ValueError(f"{folder} holds other data ({'; '.join(found)}): give another --out, or delete it")


def held_request(folder: Path) -> Request | None:
    """The identity of the data that a folder holds, or is being filled with; None if it is free.

    Raises ValueError if it holds anything else.
    """
    if is_being_prepared(folder):
        staging = staging_path(folder)
        try:
            return (read_manifest if is_complete(staging) else read_state)(staging).request
        except (OSError, ValueError, LookupError, TypeError):  # begun just now, or by another version
            return None
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a prepared folder: give another --out, or move it away")
    return read_manifest(folder).request


def differences(before: Request, now: Request) -> list[str]:
    """What differs between two identities, in words; [] if nothing does. An unknown hash is not compared."""
    found = [
        f"{name} was {before.get(name)}, and is now {now.get(name)}"
        for name in {**now, **before}
        if name != SOURCE_HASH and before.get(name) != now.get(name)
    ]
    if now[SOURCE_HASH] and before.get(SOURCE_HASH) != now[SOURCE_HASH]:
        found.append("the text of the source is another, or was edited since")
    return found


def _possible_folders(config: PrepareConfig) -> list[Path]:
    """The folder that `choose_folder` takes first, and those with a digest in their names."""
    usual = output_folder(config)
    own = re.compile(rf"\.?({re.escape(usual.name)}-[0-9a-f]{{{DIGEST_DIGITS}}})(\.partial)?")
    if config.out is not None or not usual.parent.is_dir():
        return [usual]
    found = {match[1] for path in usual.parent.iterdir() if (match := own.fullmatch(path.name))}
    return [usual, *(usual.with_name(name) for name in sorted(found))]
