import json
from pathlib import Path

import pytest

from overnight.runs.status import METRICS_KEYS, TAIL_BYTES, Lines, read_ends, read_lines

READERS = [read_lines, read_ends]


def write(path: Path, steps: int, **extra: object) -> list[str]:
    lines = [json.dumps({"step": n, "tokens": 8 * n, "loss": 3.0, **extra}) for n in range(1, steps + 1)]
    path.write_text("\n".join(lines) + "\n")
    return lines


@pytest.mark.parametrize("read", READERS)
def test_every_line_of_a_sound_file_is_read(read, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    lines = read(path, METRICS_KEYS)
    assert [line["step"] for line in lines.values] == [1, 2, 3, 4, 5]
    assert lines.problems == ()
    assert not lines.is_torn


@pytest.mark.parametrize("read", READERS)
def test_no_file_and_an_empty_file_hold_nothing(read, tmp_path):
    assert read(tmp_path / "metrics.jsonl", METRICS_KEYS) == Lines()
    (tmp_path / "metrics.jsonl").touch()
    assert read(tmp_path / "metrics.jsonl", METRICS_KEYS) == Lines()


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("torn", ['{"step": 6, "tok', "\x00\x00\x00", '{"step": 6}', "\n"])
def test_a_torn_last_line_is_no_damage(read, torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    path.write_text(path.read_text() + torn)
    lines = read(path, METRICS_KEYS)
    assert [line["step"] for line in lines.values] == [1, 2, 3, 4, 5]
    assert lines.problems == ()
    assert lines.is_torn


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"step": 3}',
        b'{"step": "3", "tokens": 1, "loss": 1.0}',
        b'{"step": 1e999, "tokens": 1, "loss": 1.0}',
        b'{"step": -1, "tokens": 1, "loss": 1.0}',
        b'{"step": 3, "tokens": 1, "loss": "null"}',
        b'{"step": 3, "tokens": 1}',
        b'{"step": null, "tokens": 1, "loss": 1.0}',
        b'{"step": 3, "tokens": null, "loss": 1.0}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_left_out_and_named(read, damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    lines = path.read_bytes().split(b"\n")
    lines[2] = damaged
    path.write_bytes(b"\n".join(lines))
    found = read(path, METRICS_KEYS)
    assert [line["step"] for line in found.values] == [1, 2, 4, 5]
    assert len(found.problems) == 1
    assert "metrics.jsonl line 3 is damaged" in found.problems[0]


def test_a_loss_that_is_not_a_number_is_news_not_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "tokens": 1, "loss": null, "grad_norm": null}\n'
        '{"step": 2, "tokens": 2, "loss": NaN}\n'  # as files were written that were not quite JSON
        '{"step": 3, "tokens": 3, "loss": Infinity}\n'
    )
    found = read_lines(path, METRICS_KEYS)
    assert found.problems == ()
    assert [str(line["loss"]) for line in found.values] == ["nan", "nan", "inf"]
    assert found.values[0]["grad_norm"] is None


def test_only_the_ends_of_a_long_file_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 20_000)
    found = read_ends(path, METRICS_KEYS)
    steps = [line["step"] for line in found.values]
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert steps == sorted(set(steps))
    assert len(steps) * len(lines[-1]) < 2.2 * TAIL_BYTES
    assert found.problems == ()
    assert not found.is_torn

    path.write_text("\n".join([*lines[:-5], "damaged", *lines[-4:], '{"torn']))
    found = read_ends(path, METRICS_KEYS)
    assert found.values[-1]["step"] == 20_000
    assert found.is_torn
    assert [problem[:38] for problem in found.problems] == ["metrics.jsonl line 19,996 is damaged a"]


def test_a_long_file_with_an_unreadable_end_is_damaged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 5_000)
    path.write_bytes(path.read_bytes() + b"\x00" * 200_000)
    assert "hold no readable line" in read_ends(path, METRICS_KEYS).problems[0]
