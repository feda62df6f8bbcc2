"""What could make the benchmark of communication lie: a fit that sees what it is to foretell, other sums."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from overnight.planning.network import Cluster, Collective, Link, collective_seconds


@pytest.fixture
def program(benchmarks: dict[str, Any]) -> Any:
    return benchmarks["communication"]


def exact_times(kind: Any, processes: int, sizes: list[int]) -> dict[int, float]:
    """Those of a link of 2 GB/s whose calls take a millisecond to start."""
    link = Link(name="", bytes_per_second=2e9, message_seconds=0.0, start_seconds=1e-3, source="")
    there = Cluster(machines=1, processes_per_machine=processes, within=link)
    return {size: collective_seconds(Collective(kind, "all", 1, size), there) for size in sizes}


@pytest.mark.parametrize("processes", [2, 4])
def test_a_fit_finds_the_link_that_there_is(program: Any, processes: int) -> None:
    for kind in program.KINDS:
        times = exact_times(kind, processes, [10**4, 10**6, 10**8])
        link = program.fit_link(kind, times, processes)
        assert link.bytes_per_second == pytest.approx(2e9)
        assert link.start_seconds == pytest.approx(1e-3)


def test_what_is_checked_was_not_fitted(program: Any) -> None:
    """A size in between takes ten times too long: the fit does not know, and the error shows it."""
    times = exact_times("all-reduce", 2, [10**4, 10**5, 10**6, 10**7])
    times[10**5] *= 10
    assert list(program.fitted_sizes(times)) == [10**4, 10**6]
    links = {"all-reduce": program.fit_link("all-reduce", program.fitted_sizes(times), 2)}
    rows = program.size_rows("all-reduce", 2, times, links)
    assert [row[5:] for row in rows] == [["+0%", "fitted"], ["-90%", ""], ["+0%", "fitted"], ["+0%", ""]]
    checked = [row for row in rows if not row[-1]]
    assert program.summary(checked) == "the median error is 45%, the largest 90%"


@pytest.mark.parametrize("name", ["replicated", "ZeRO-1", "FSDP2"])
def test_a_step_that_is_said_is_the_one_that_is_foretold(
    program: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As many calls of each kind, and as many bytes, as the model lists: counted where they are made."""
    said: list[tuple[str, int]] = []
    names = {"all_reduce": "all-reduce", "broadcast": "broadcast"}
    for function, kind in names.items():
        monkeypatch.setattr(
            torch.distributed, function, lambda flat, *more, kind=kind: said.append((kind, flat.nbytes))
        )
    monkeypatch.setattr(program, "say", lambda kind, whole, part: said.append((kind, whole.nbytes)))
    monkeypatch.setattr(program, "slowest", lambda action: float(action() is None))
    options = program.read_options(["--layers", "3", "--channels", "32"])
    model, here = program.model_of(options), program.World(rank=0, size=4, device="cpu")
    program.time_step(program.STEPS[name], here, model)
    there = Cluster(machines=1, processes_per_machine=4, within=program._link(1e9, 0.0))
    listed = program.list_collectives(model, program.STEPS[name], there, program.MICRO_BATCHES)
    for each in listed:
        sizes = [size for kind, size in said if kind == each.kind]
        assert len(sizes) == each.calls
        assert sum(sizes) == each.bytes
    assert {kind for kind, _ in said} == {each.kind for each in listed}


def test_two_processes_really_talk(program: Any) -> None:
    words = ["--processes", "2", "--largest", "0.1", "--layers", "1", "--channels", "8", "--repeats", "1"]
    report = program.compare(program.read_options(words))
    assert len(report.rows) == 4 * 6 + 3
    assert {row[1] for row in report.rows} == {"2"}
    assert all(float(row[3].replace(",", "")) > 0 for row in report.rows)
    assert [row[0] for row in report.rows[-3:]] == ["a step, replicated", "a step, ZeRO-1", "a step, FSDP2"]
    assert json.loads(report.as_json())["measured"]["times"]["2"]["copy_bytes_per_second"] > 0
    assert "| all-gather " in report.as_markdown()


@pytest.mark.parametrize(
    "words", [["--processes", "1"], ["--repeats", "0"], ["--largest", "0"]], ids=" ".join
)
def test_what_can_t_be_measured_is_refused(program: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="give --processes of at least 2, --repeats of at least 1"):
        program.compare(program.read_options(words))
