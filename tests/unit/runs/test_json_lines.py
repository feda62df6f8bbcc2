import json
from pathlib import Path

import pytest

from overnight.runs.json_lines import END_BYTES, LOSS_KEYS, JsonLines, read_lines

WHOLE_OR_ENDS = pytest.mark.parametrize("only_ends", [False, True])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: int) -> list[str]:
    lines = [json.dumps({"step": n, "tokens": 8 * n, "loss": 3.0}) for n in range(1, steps + 1)]
    path.write_text("\n".join(lines) + "\n")
    return lines


@WHOLE_OR_ENDS
@pytest.mark.parametrize("torn", ["", '{"step": 6, "tok', "\x00\x00\x00", '{"step": 6}', "\n"])
def test_torn_last_line_is_not_damage(only_ends, torn, path):
    assert read_lines(path, LOSS_KEYS, only_ends=only_ends) == JsonLines()  # no file
    path.touch()
    assert read_lines(path, LOSS_KEYS, only_ends=only_ends) == JsonLines()
    values = tuple(map(json.loads, write(path, 5)))
    path.write_text(path.read_text() + torn)
    expected = JsonLines(values=values, is_torn=bool(torn))
    assert read_lines(path, LOSS_KEYS, only_ends=only_ends) == expected


@WHOLE_OR_ENDS
@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"step": "3", "tokens": 1, "loss": 1.0}',
        b'{"step": 1e999, "tokens": 1, "loss": 1.0}',
        b'{"step": -1, "tokens": 1, "loss": 1.0}',
        b'{"step": 3, "tokens": 1, "loss": "null"}',
        b'{"step": 3, "tokens": 1}',
        b'{"step": 3, "tokens": null, "loss": 1.0}',
        b"[" * 100_000,
    ],
)
def test_damaged_line_is_left_out_and_reported(only_ends, damaged, path):
    write(path, 5)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damaged
    path.write_bytes(b"\n".join(lines))
    found = read_lines(path, LOSS_KEYS, only_ends=only_ends)
    assert [line["step"] for line in found.values] == [1, 2, 4, 5]
    (problem,) = found.problems
    assert "metrics.jsonl line 3 " in problem


def test_loss_that_is_not_finite_is_not_damage(path):
    path.write_text(
        '{"step": 1, "tokens": 1, "loss": null, "grad_norm": null}\n'
        '{"step": 2, "tokens": 2, "loss": NaN}\n'  # older files hold these, which are not JSON
        '{"step": 3, "tokens": 3, "loss": Infinity}\n'
    )
    found = read_lines(path, LOSS_KEYS)
    assert found.problems == ()
    assert [str(line["loss"]) for line in found.values] == ["nan", "nan", "inf"]
    assert found.values[0]["grad_norm"] is None


def test_only_the_ends_of_a_long_file_are_read(path):
    lines = write(path, 20_000)
    found = read_lines(path, LOSS_KEYS, only_ends=True)
    steps = [line["step"] for line in found.values]
    assert (steps[0], steps[-1], found.problems, found.is_torn) == (1, 20_000, (), False)
    assert steps == sorted(set(steps))
    assert len(steps) * len(lines[-1]) < 2.2 * END_BYTES

    path.write_text("\n".join([*lines[:-5], "damaged", *lines[-4:], '{"torn']))
    found = read_lines(path, LOSS_KEYS, only_ends=True)
    assert (found.values[-1]["step"], found.is_torn) == (20_000, True)
    assert [problem.split(" is ")[0] for problem in found.problems] == ["metrics.jsonl line 19,996"]

    path.write_bytes(path.read_bytes() + b"\x00" * 200_000)
    (problem,) = read_lines(path, LOSS_KEYS, only_ends=True).problems
    assert "no readable line" in problem
