"""D6: the same text, prepared by another number of workers, in another locale, zone, place: the same bytes.

    python tests/campaigns/faults_surroundings.py - prepare FOLDER --out OUT

It is a program as well: each trial is a process of its own from the first instruction on, since Python reads
its locale and the seed of its hashes only then. The first word is the name of a mutant, or a dash.
"""

from __future__ import annotations

import dataclasses
import datetime
import locale
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_corpus import OUT, TEXTS, command, digest, find_wrong, small_units
from mutants import original, replace

SHUFFLED = "SHUFFLE_FOLDERS"  # the seed of the order in which folders list what they hold
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@dataclass(frozen=True)
class Surroundings:
    """What differs from one trial to the next."""

    name: str
    workers: int = 2
    variables: dict[str, str] = field(default_factory=dict)
    corpus: str = "{text}"
    """How the folder of texts is named."""
    below: str = "."
    """The current folder, below that of the trial."""


ELSEWHERE = Surroundings("another current folder", below="deep/er", corpus=f"../../../{TEXTS}")


def list_surroundings() -> list[Surroundings]:
    """All that are tried here; of the locales those that this machine has."""
    locales = [
        name for name in ("C", "POSIX", "C.UTF-8", "tr_TR.UTF-8", "de_DE.ISO-8859-1") if has_locale(name)
    ]
    return [
        *(Surroundings(f"workers {count}", workers=count) for count in (1, 3, 4, 8)),
        *(Surroundings(f"hash seed {seed}", variables={"PYTHONHASHSEED": seed}) for seed in ("0", "1", "77")),
        *(Surroundings(f"locale {name}", variables={"LC_ALL": name, "LANG": name}) for name in locales),
        Surroundings("locale C without Python's UTF-8", variables=NO_UTF8),
        *(Surroundings(f"zone {zone}", variables={"TZ": zone}) for zone in ("Asia/Kathmandu", "UTC+14")),
        ELSEWHERE,
        *(Surroundings(f"folders listed in order {n}", variables={SHUFFLED: str(n)}) for n in (1, 2, 3)),
    ]


def has_locale(name: str) -> bool:
    """True if a process can have it."""
    code = f"import locale; locale.setlocale(locale.LC_ALL, {name!r})"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def prepare_in(place: Path, these: Surroundings, mutant: str = "-") -> str:
    """Prepare once: the folder's sha256. Raises ValueError if that fails, or leaves something beside it."""
    trial = place / "elsewhere"
    current = trial / these.below
    current.mkdir(parents=True)
    words = command(these.corpus.format(text=place / TEXTS), "--workers", str(these.workers))
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), mutant, *words],
            cwd=current,
            env={**os.environ, **these.variables},
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(f"{these.name}: {done.stderr.decode(errors='replace')[-1500:]}")
        found = digest(current / OUT)
        if wrong := find_wrong(current / OUT, found):
            raise ValueError(f"{these.name}: {wrong}")
        return found
    finally:
        shutil.rmtree(trial)


def vary(place: Path, expected: str, chosen: list[Surroundings]) -> list[list[str]]:
    """Each of these, and as many mutants. Raises ValueError if one differs, or a mutant never does."""
    for these in chosen:
        if prepare_in(place, these) != expected:
            raise ValueError(f"{these.name}: the folder differs from one written undisturbed")
    rows = [["D6: the same bytes in other environments", f"{len(chosen)}/{len(chosen)}"]]
    for words, (mutant, one, other) in list(CONTROLS.items())[: len(chosen)]:
        if prepare_in(place, one, mutant.__name__) == prepare_in(place, other, mutant.__name__):
            raise ValueError(f"the mutant that {words} was not caught: the campaign proves nothing")
        rows.append([f"control, a mutant that {words}: noticed", "1/1"])
    return rows


# ---------------------------------------------------------------- in the process of a trial


def shuffle_folders(seed: int) -> None:
    """Folders list what they hold in another order."""
    scandir, listdir, draw = os.scandir, os.listdir, random.Random(seed)

    class Shuffled:
        """What os.scandir returns."""

        def __init__(self, *where: Any) -> None:
            with scandir(*where) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
            draw.shuffle(entries)
            self._entries = iter(entries)

        def __enter__(self) -> Iterator[Any]:
            return self._entries

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Iterator[Any]:
            return self._entries

        def __next__(self) -> Any:
            return next(self._entries)

        def close(self) -> None:
            """Nothing is open."""

    def listdir_shuffled(*where: Any) -> list[Any]:
        names = sorted(listdir(*where))
        draw.shuffle(names)
        return names

    os.scandir, os.listdir = Shuffled, listdir_shuffled


def order_by_workers() -> None:
    """What another worker has done comes first."""
    target = "overnight.preparation.tokenize:tokenize_documents"
    real = original(target)

    def turned(documents: Any, tokenizer: Any, threads: int = 1, *more: Any, **options: Any) -> Any:
        found = list(documents)
        return real(found[threads - 1 :] + found[: threads - 1], tokenizer, threads, *more, **options)

    replace(target, turned)


def order_of_hashes() -> None:
    """The files are held in a set."""
    target = "overnight.data.text_files:list_files"
    real = original(target)

    def from_a_set(*given: Any) -> Any:
        listing = real(*given)
        by_name = {file.name: file for file in listing.files}
        return listing._replace(files=[by_name[name] for name in set(by_name)])

    replace(target, from_a_set)


def order_of_listing() -> None:
    """The files are read as the folder lists them."""
    target = "overnight.data.text_files:list_files"
    real = original(target)

    def as_listed(source: str, *others: Any) -> Any:
        listed = [str(Path(folder, name)) for folder, _, names in os.walk(source) for name in names]
        listing = real(source, *others)
        return listing._replace(files=sorted(listing.files, key=lambda file: listed.index(file.address)))

    replace(target, as_listed)


def decode_by_locale() -> None:
    """Texts are decoded as the locale says, as open() does if nothing is said."""

    def decode(data: bytes, *_: object) -> tuple[str, None]:
        return data.decode(locale.getencoding(), "replace"), None

    replace("overnight.preparation.documents:_decode", decode)


def name_the_path() -> None:
    """The source is called by the path that was typed."""
    target = "overnight.preparation.identity:describe_request"
    real = original(target)
    replace(target, lambda config, source: real(config, source) | {"source": config.source})


def note_the_hour() -> None:
    """The hour on the wall is written down."""
    target = "overnight.preparation.assemble:ShardAssembler.manifest"
    real, hour = original(target), datetime.datetime.fromtimestamp(0).hour
    replace(target, lambda *words: dataclasses.replace(real(*words), licence=f"from {hour} on"))


PLAIN = Surroundings("as it is", variables={"PYTHONHASHSEED": "0"})
CONTROLS = {
    "orders documents by worker": (order_by_workers, PLAIN, Surroundings("workers 3", workers=3)),
    "holds the files in a set": (
        order_of_hashes,
        PLAIN,
        Surroundings("hash seed 1", variables={"PYTHONHASHSEED": "1"}),
    ),
    "decodes by the locale": (
        decode_by_locale,
        Surroundings("locale C.UTF-8", variables={"LC_ALL": "C.UTF-8"}),
        Surroundings("locale C", variables=NO_UTF8),
    ),
    "records the time of day": (
        note_the_hour,
        Surroundings("zone UTC", variables={"TZ": "UTC"}),
        Surroundings("zone of Nepal", variables={"TZ": "Asia/Kathmandu"}),
    ),
    "records the path": (name_the_path, PLAIN, ELSEWHERE),
    "reads files in directory order": (
        order_of_listing,
        PLAIN,
        Surroundings("folders listed in another order", variables={SHUFFLED: "1"}),
    ),
}
"""What a mutant does, and two surroundings in which that shows."""
MUTANTS = {mutant.__name__: mutant for mutant, _, _ in CONTROLS.values()}


def main(words: list[str]) -> int:
    """`overnight`, as this process's surroundings and the first word have it."""
    small_units()
    if SHUFFLED in os.environ:
        shuffle_folders(int(os.environ[SHUFFLED]))
    if words[0] != "-":
        MUTANTS[words[0]]()
    from overnight.cli import main as overnight

    return overnight(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
