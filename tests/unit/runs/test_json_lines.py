import json
from pathlib import Path

import pytest

from overnight.runs.json_lines import METRICS_KEYS, TAIL_BYTES, JsonLines, read_ends, read_lines

BOTH_READERS = pytest.mark.parametrize("read", [read_lines, read_ends])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: int) -> list[str]:
    lines = [json.dumps({"step": n, "tokens": 8 * n, "loss": 3.0}) for n in range(1, steps + 1)]
    path.write_text("\n".join(lines) + "\n")
    return lines


@BOTH_READERS
def test_every_valid_line_is_read(read, path):
    assert read(path, METRICS_KEYS) == JsonLines()  # no file
    path.touch()
    assert read(path, METRICS_KEYS) == JsonLines()
    lines = write(path, 5)
    assert read(path, METRICS_KEYS) == JsonLines(values=tuple(map(json.loads, lines)))


@BOTH_READERS
@pytest.mark.parametrize("torn", ['{"step": 6, "tok', "\x00\x00\x00", '{"step": 6}', "\n"])
def test_torn_last_line_is_not_damage(read, torn, path):
    write(path, 5)
    path.write_text(path.read_text() + torn)
    lines = read(path, METRICS_KEYS)
    assert (len(lines.values), lines.problems, lines.is_torn) == (5, (), True)


@BOTH_READERS
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
def test_damaged_line_is_left_out_and_reported(read, damaged, path):
    write(path, 5)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damaged
    path.write_bytes(b"\n".join(lines))
    found = read(path, METRICS_KEYS)
    assert [line["step"] for line in found.values] == [1, 2, 4, 5]
    (problem,) = found.problems
    assert "metrics.jsonl line 3 " in problem


def test_loss_that_is_not_finite_is_not_damage(path):
    path.write_text(
        '{"step": 1, "tokens": 1, "loss": null, "grad_norm": null}\n'
        '{"step": 2, "tokens": 2, "loss": NaN}\n'  # older files hold these, which are not JSON
        '{"step": 3, "tokens": 3, "loss": Infinity}\n'
    )
    found = read_lines(path, METRICS_KEYS)
    assert found.problems == ()
    assert [str(line["loss"]) for line in found.values] == ["nan", "nan", "inf"]
    assert found.values[0]["grad_norm"] is None


def test_only_the_ends_of_a_long_file_are_read(path):
    lines = write(path, 20_000)
    found = read_ends(path, METRICS_KEYS)
    steps = [line["step"] for line in found.values]
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert steps == sorted(set(steps))
    assert len(steps) * len(lines[-1]) < 2.2 * TAIL_BYTES
    assert (found.problems, found.is_torn) == ((), False)

    path.write_text("\n".join([*lines[:-5], "damaged", *lines[-4:], '{"torn']))
    found = read_ends(path, METRICS_KEYS)
    assert (found.values[-1]["step"], found.is_torn) == (20_000, True)
    assert [problem.split(" is ")[0] for problem in found.problems] == ["metrics.jsonl line 19,996"]

    path.write_bytes(path.read_bytes() + b"\x00" * 200_000)
    assert any("no readable line" in problem for problem in read_ends(path, METRICS_KEYS).problems)
