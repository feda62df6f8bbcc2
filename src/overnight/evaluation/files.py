"""Where the official files of tasks lie: in a folder of the user's, or in the cache, fetched once.

Their publishers state no sha256. It is recorded when a file is fetched, and checked from then on.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tarfile
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from overnight.cache import cache_folder
from overnight.run_directory import write_atomically
from overnight.terminal import say

TIMEOUT_SECONDS = 60.0


def find_file(name: str, url: str, folder: Path | None = None) -> Path:
    """The file of that name, in `folder` if one is given, or fetched from `url`, be it packed there or not.

    A name may hold the folders that the file lies in where it is packed. Raises ValueError, with what to
    fetch and where to put it, if there is no such file and it can't be fetched; and if one that was fetched
    is not as it was any more.
    """
    if folder is not None:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: fetch {url} and put that there")
        return folder / name
    path = cache_folder() / "tasks" / name
    recorded = path.with_name(f"{path.name}.sha256")
    if not path.is_file():
        say(f"fetching {url}, once")
        content = _fetch(name, url, path)
        write_atomically(recorded, hashlib.sha256(content).hexdigest() + "\n")
        write_atomically(path, content)
    elif recorded.is_file() and _digest(path) != recorded.read_text(encoding="ascii").strip():
        raise ValueError(f"{path} is not as it was fetched: delete it, and it is fetched again")
    return path


def _fetch(name: str, url: str, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
        return _unpack(name, url, content)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, LookupError) as error:
        raise ValueError(
            f"{name} is not on this machine and can't be fetched ({error}): fetch {url} elsewhere and put it "
            f"at {path}, or name the folder it lies in with --task-files"
        ) from None


def _unpack(name: str, url: str, content: bytes) -> bytes:
    """What lies under this name in a packed file; any other file as it is."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            return packed.read(_find_inside(name, packed.namelist()))
    if url.endswith((".tgz", ".tar.gz")):
        with tarfile.open(fileobj=io.BytesIO(content)) as folder:
            file = folder.extractfile(_find_inside(name, folder.getnames()))
            if file is None:
                raise LookupError(f"{name} is no file there")
            return file.read()
    return content


def _find_inside(name: str, names: Sequence[str]) -> str:
    wanted = PurePosixPath(name).parts
    for each in names:
        if PurePosixPath(each).parts[-len(wanted) :] == wanted:
            return each
    raise LookupError(f"no {name} among its {len(names)} files")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
