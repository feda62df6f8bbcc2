from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from overnight.data.atomic_folder import (
    exclusive,
    plain_file_errors,
    publish_folder,
    published_path,
    require_disk_space,
    staging_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never(place: Path) -> bool:
    return False


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "data", never) as place:
        (place / "a").write_text("a")
        assert not (tmp_path / "data").exists()
    assert published_path(place) == tmp_path / "data"
    publish_folder(tmp_path / "data")
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["a"]


@pytest.mark.parametrize(
    "error,left", [(KeyboardInterrupt(), True), (OSError("disk"), True), (ValueError("no"), False)]
)
def test_an_interruption_leaves_what_is_done_and_a_refusal_nothing(
    tmp_path: Path, error: BaseException, left: bool
) -> None:
    def stopped() -> None:
        with staging_folder(tmp_path / "data", never) as place:
            (place / "a").write_text("a")
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert names(tmp_path) == ([".data.partial"] if left else [])


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_killed_process_left_is_gone_on_with_or_removed(tmp_path: Path, goes_on: bool) -> None:
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "old").write_text("old")
    with staging_folder(tmp_path / "data", lambda place: goes_on) as place:
        (place / "new").write_text("new")
    publish_folder(tmp_path / "data")
    assert names(tmp_path / "data") == (["new", "old"] if goes_on else ["new"])


def test_an_empty_folder_is_filled_and_a_full_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with staging_folder(tmp_path / "data", never) as place:
        (place / "a").write_text("a")
    publish_folder(tmp_path / "data")
    with staging_folder(tmp_path / "data", never), pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "data")
    assert names(tmp_path / "data") == ["a"]


def test_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside: list[str] = []

    def second() -> None:
        with exclusive(tmp_path / "data"):
            inside.append("second")

    with exclusive(tmp_path / "data"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        assert inside == []
        inside.append("first")
    thread.join(timeout=10)
    assert inside == ["first", "second"]
    assert "waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(code: int) -> None:
    message = r"the disk of data is full: free some and give the same command again, .* --out"
    with pytest.raises(ValueError, match=message), plain_file_errors(Path("data")):
        raise OSError(code, "No space left on device")


def test_a_closed_folder_is_a_sentence() -> None:
    message = r"/x/y may not be touched \(Permission denied\)"
    with pytest.raises(ValueError, match=message), plain_file_errors(Path("data")):
        raise PermissionError(errno.EACCES, "Permission denied", "/x/y")


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="Input/output error"), plain_file_errors(Path("data")):
        raise OSError(errno.EIO, "Input/output error")


def test_too_little_space_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    require_disk_space(tmp_path, 10**9)
    with pytest.raises(ValueError, match=r"need about 20\.00 GB and the disk of .* has 1\.00 GB free"):
        require_disk_space(tmp_path, 20 * 10**9)
