from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from overnight.doctor import step_checks
from overnight.doctor.step_checks import MeasuredStep, check_precision, compare_first_steps, run_in_two

RANK = "rank = os.environ['RANK']; "


def test_step_is_measured_before_the_next_is_built(monkeypatch):
    """The precision of float32 products is one for the whole process, and set where a run is built."""
    measured = []

    def measure(_run):
        measured.append(torch.get_float32_matmul_precision())
        return MeasuredStep(1.0, torch.ones(1))

    def build(precision="fp32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    monkeypatch.setattr(step_checks, "measure_pass", measure)
    context = SimpleNamespace(
        recipe=SimpleNamespace(compute=SimpleNamespace(precision="tf32")),
        world=SimpleNamespace(device="cpu"),
        tiny_run=SimpleNamespace(build=build),
    )
    assert check_precision(context).passed
    assert measured == ["high", "highest"]


@pytest.mark.parametrize(
    "together, passed",
    [
        ([(5.0, 1.00001), (4.0, 2.0)], True),
        ([(5.0, 1.0), (4.01, 2.0)], False),
        ([(5.0, 1.0), (4.0, math.nan)], False),
        ([(math.nan, 1.0), (4.0, 2.0)], False),
    ],
)
def test_steps_of_two_processes_are_compared(together, passed):
    assert compare_first_steps([(5.0, 1.0), (4.0, 2.0)], together).passed is passed


def test_both_processes_run_the_line_and_their_output_is_kept(tmp_path):
    path = "f'{sys.argv[1]}/rank-{rank}'"
    run_in_two(f"{RANK}print('kept'); open({path}, 'w').write(os.environ['WORLD_SIZE'])", tmp_path)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert [path.read_text() for path in tmp_path.glob("*.log")] == ["kept\n"] * 2


def test_failure_is_reported_with_its_last_line(tmp_path, capfd):
    line = f"{RANK}print('first'); sys.exit('the text is gone' if rank == '1' else 0)"
    with pytest.raises(RuntimeError, match=r"process 1 .*the text is gone$"):
        run_in_two(line, tmp_path)
    assert capfd.readouterr().err == ""
