from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from overnight.data.atomic_folder import (
    exclusive,
    is_locked_folder,
    plain_file_errors,
    publish_folder,
    published_path,
    staging_folder,
    staging_path,
)


def fill(folder: Path, name: str, *, can_resume: bool = False, error: BaseException | None = None) -> Path:
    with staging_folder(folder, lambda _: can_resume) as staging:
        (staging / name).write_text(name)
        if error is not None:
            raise error
    return staging


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_published_and_replaces_only_an_empty_one(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    staging = fill(folder, "a")
    assert not folder.exists()
    assert (staging_path(folder), published_path(staging)) == (staging, folder)
    folder.mkdir()
    publish_folder(folder)
    assert names(tmp_path) == ["data"]
    fill(folder, "b")
    with pytest.raises(OSError, match="not empty"):
        publish_folder(folder)
    assert names(folder) == ["a"]


@pytest.mark.parametrize(
    "error,left", [(KeyboardInterrupt(), True), (OSError("disk"), True), (ValueError("no"), False)]
)
def test_interruption_keeps_staging_folder_and_value_error_deletes_it(
    tmp_path: Path, error: BaseException, left: bool
) -> None:
    with pytest.raises(type(error)):
        fill(tmp_path / "data", "a", error=error)
    assert names(tmp_path) == ([".data.partial"] if left else [])


@pytest.mark.parametrize("can_resume", [True, False])
def test_staging_folder_is_resumed_or_emptied(tmp_path: Path, can_resume: bool) -> None:
    staging_path(tmp_path / "data").mkdir()
    (staging_path(tmp_path / "data") / "old").write_text("old")
    fill(tmp_path / "data", "new", can_resume=can_resume)
    publish_folder(tmp_path / "data")
    assert names(tmp_path / "data") == (["new", "old"] if can_resume else ["new"])


def test_lock_is_exclusive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, order = tmp_path / "data", []

    def second() -> None:
        with exclusive(folder):
            order.append("second")

    with exclusive(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        assert is_locked_folder(folder)
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]
    assert not is_locked_folder(folder)
    assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,match",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of data is full.*--out"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "the disk of data is full.*--out"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), r"/x/y .*\(Permission denied\)"),
        (OSError(errno.EIO, "Input/output error"), None),
    ],
)
def test_disk_errors_become_sentences_and_others_pass(error: OSError, match: str | None) -> None:
    with pytest.raises(ValueError if match else OSError, match=match), plain_file_errors(Path("data")):
        raise error
