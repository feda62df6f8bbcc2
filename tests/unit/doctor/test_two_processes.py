from __future__ import annotations

from pathlib import Path

import pytest

from overnight.doctor.two_processes import run_in_two

RANK = "rank = os.environ['RANK']; "


def test_both_processes_run_the_line(tmp_path: Path) -> None:
    path = "f'{sys.argv[1]}/rank-{rank}'"
    line = f"{RANK}print('hidden'); open({path}, 'w').write(os.environ['WORLD_SIZE'])"
    run_in_two(line, [str(tmp_path)], tmp_path / "logs")
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert "hidden" in "".join(path.read_text() for path in (tmp_path / "logs" / "output").iterdir())


def test_failure_is_reported_with_its_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = f"{RANK}print('first'); sys.exit('the text is gone' if rank == '1' else 0)"
    with pytest.raises(RuntimeError, match="^process 1 of two failed: the text is gone$"):
        run_in_two(line, [], tmp_path)
    assert capfd.readouterr().err == ""
