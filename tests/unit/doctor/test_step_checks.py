from __future__ import annotations

from pathlib import Path

import pytest

from overnight.doctor.step_checks import compare_first_steps, run_in_two

RANK = "rank = os.environ['RANK']; "


@pytest.mark.parametrize(
    "together, passed",
    [
        ([(5.0, 1.00001), (4.0, 2.0)], True),
        ([(5.0, 1.0), (4.01, 2.0)], False),
        ([(5.0, 1.0), (4.0, float("nan"))], False),
        ([(float("nan"), 1.0), (4.0, 2.0)], False),
    ],
)
def test_steps_of_two_processes_are_compared(together: list[tuple[float, float]], passed: bool) -> None:
    assert compare_first_steps([(5.0, 1.0), (4.0, 2.0)], together).passed is passed


def test_both_processes_run_the_line_and_their_output_is_kept(tmp_path: Path) -> None:
    path = "f'{sys.argv[1]}/rank-{rank}'"
    run_in_two(f"{RANK}print('kept'); open({path}, 'w').write(os.environ['WORLD_SIZE'])", tmp_path)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert [path.read_text() for path in tmp_path.glob("*.log")] == ["kept\n"] * 2


def test_failure_is_reported_with_its_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = f"{RANK}print('first'); sys.exit('the text is gone' if rank == '1' else 0)"
    with pytest.raises(RuntimeError, match=r"process 1 .*the text is gone$"):
        run_in_two(line, tmp_path)
    assert capfd.readouterr().err == ""
