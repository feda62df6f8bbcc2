"""The official files of tasks: found in a folder, or downloaded once and verified from then on."""

from __future__ import annotations

import hashlib
import http.client
import io
import tarfile
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from overnight.run_directory import cache_folder, write_atomically
from overnight.terminal import echo

TIMEOUT_SECONDS = 60.0


def find_file(name: str, url: str, folder: str | Path | None = None) -> Path:
    """The file `name` in `folder`, or without one downloaded from `url`, an archive or the file itself.

    `name` may contain folders of the archive. Raises ValueError, with what to download and where to put it,
    if there is no such file; and if a downloaded file has changed since.
    """
    if folder is not None:
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}: download {url} and put it there")
        return path
    path = cache_folder() / "tasks" / name
    recorded = path.with_name(f"{path.name}.sha256")
    if not path.is_file():
        echo(f"downloading {url}")
        content = _download(name, url, path)
        write_atomically(recorded, _sha256(content) + "\n")
        write_atomically(path, content)
    elif recorded.is_file() and _sha256(path.read_bytes()) != recorded.read_text(encoding="ascii").strip():
        raise ValueError(f"{path} has changed since its download: delete it to download it again")
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(name: str, url: str, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
        return _extract(name, url, content)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, LookupError) as error:
        raise ValueError(
            f"{name} is not on this machine and cannot be downloaded ({error}): put it from {url} at "
            f"{path}, or name its folder with --task-files"
        ) from None


def _extract(name: str, url: str, content: bytes) -> bytes:
    """The file `name` of an archive; any other content unchanged."""
    if url.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(_member(name, archive.namelist()))
    if url.endswith((".tgz", ".tar.gz")):
        with tarfile.open(fileobj=io.BytesIO(content)) as folder:
            file = folder.extractfile(_member(name, folder.getnames()))
            if file is None:
                raise LookupError(f"{name} is not a file of the archive")
            return file.read()
    return content


def _member(name: str, members: Sequence[str]) -> str:
    found = [member for member in members if PurePosixPath(member).match(name)]
    if not found:
        raise LookupError(f"no {name} among the {len(members)} files of the archive")
    return found[0]
