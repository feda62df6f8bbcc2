"""Figures are computed from made-up times and losses, so that the truth is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from xml.etree import ElementTree

import pytest

from overnight.bench.table import (
    BenchRecord,
    VariantRecord,
    bench_markdown,
    bench_svg,
    bench_text,
    bench_to_json,
)
from overnight.report.plots import ACCENT

LOSSES = (10.9872, 10.8131, 10.5342, 10.2087, 9.9120, 9.1)
NAMES = ("float32", "bf16", "compile", "fused-attention", "block-attention", "pad-vocab", "fused-adamw")


def variant(
    name: str,
    milliseconds: tuple[float, ...],
    before: tuple[float, ...] = (),
    losses: tuple[float, ...] = LOSSES,
) -> VariantRecord:
    return VariantRecord(
        name=name,
        about=f"what {name} is",
        tolerance=0.0200001,
        milliseconds=milliseconds,
        milliseconds_before=before,
        losses=losses,
        peak_bytes=4_710_000_000,
    )


def record_of(*variants: VariantRecord) -> BenchRecord:
    return BenchRecord(
        model="gpt2-124m",
        device_name="AMD EPYC 9V45 96-Core Processor",
        tokens_per_step=2048,
        about_step="a step of 2 x 1,024 = 2,048 tokens",
        flops_per_token=855_000_000,
        peak_flops=430e9,
        about_peak="measured in each round: a large bf16 matrix product",
        variants=variants,
        environment={"text": "Python's documentation", "torch": "2.13.0"},
    )


def full_record(losses: tuple[float, ...] = LOSSES) -> BenchRecord:
    """Seven variants, each 1.5 times as fast as the one before, and a skipped one; `losses` of the last."""
    times = [tuple(12_345.0 / 1.5**number * noise for noise in (1.0, 1.1, 0.9)) for number in range(7)]
    first, *others, last = map(variant, NAMES, times, [(), *times])
    skipped = VariantRecord(name="tf32", about="x", skipped="it needs an NVIDIA GPU since Ampere (2020)")
    return record_of(first, skipped, *others, dataclasses.replace(last, losses=losses))


def test_gain_is_the_median_of_ratios_and_total_their_product() -> None:
    slow, fast = (8.0, 80.0, 9.0), (4.0, 20.0, 3.0)  # the second round met a busy machine
    again, faster = (8.0, 8.0, 8.0), (4.0, 2.0, 4.0)  # of another group
    figures = record_of(variant("a", slow), variant("b", fast, slow), variant("c", faster, again)).figures
    assert [figures[name].gain for name in "abc"] == [None, 3.0, 2.0]  # the medians' ratio would be 2.25
    assert [figures[name].total for name in "abc"] == [1.0, 3.0, 6.0]
    assert figures["b"].milliseconds == 4.0
    assert figures["b"].tokens_per_second == 512_000
    assert figures["b"].mfu == pytest.approx(512_000 * 0.855e9 / 430e9)


@pytest.mark.parametrize(
    "losses, is_equal, difference",
    [
        ((*LOSSES[:2], 10.5542, *LOSSES[3:]), True, 0.02),
        ((*LOSSES[:2], 10.5642, *LOSSES[3:]), False, 0.03),  # a step in the middle is compared, too
        ((*LOSSES[:4], math.nan, 9.1), False, math.nan),
        ((*LOSSES[:5], 7.0), True, 0.0),  # so late that rounding has grown
    ],
)
def test_wrong_losses_are_found(losses: tuple[float, ...], is_equal: bool, difference: float) -> None:
    times = (2.0, 2.0)
    record = record_of(variant("float32", times), variant("other", times, times, losses))
    assert record.figures["other"].difference == pytest.approx(difference, nan_ok=True)
    assert record.wrong == ([] if is_equal else ["other"])
    for shown in (bench_text(record), bench_markdown(record), bench_svg(record)):
        assert ("NOT EQUAL" in shown) is not is_equal


@pytest.mark.parametrize("losses", [LOSSES, (9.0, *LOSSES[1:])])
@pytest.mark.parametrize("columns", [80, 100])
def test_text_fits_its_columns(losses: tuple[float, ...], columns: int) -> None:
    lines = bench_text(full_record(losses), columns).splitlines()
    assert max(map(len, lines)) <= columns
    titles = next(line.split() for line in lines if line.startswith("variant"))
    assert ("loss" in titles) is (columns == 100 or losses is LOSSES)  # dropped if there is no room
    bars = [line.count("█") for line in lines if "█" in line]
    assert bars == sorted(bars)


def test_json_has_all_measurements() -> None:
    record = full_record((math.nan, *LOSSES[1:]))
    written = json.loads(json.dumps(bench_to_json(record), allow_nan=False))
    first, skipped, second, *_, last = written["rungs"]
    assert (first["figures"]["gain"], skipped["figures"]) == (None, None)
    assert second["milliseconds"] == pytest.approx([8230.0, 9053.0, 7407.0])
    assert second["figures"]["gain"] == pytest.approx(1.5)
    assert (last["losses"][0], last["figures"]["difference"]) == (None, None)


def test_markdown_has_every_variant_and_its_change() -> None:
    record = full_record()
    lines = bench_markdown(record).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(NAMES) + 1
    assert len({line.count("|") for line in table}) == 1
    assert "* **bf16**: what bf16 is." in lines
    assert lines[-1] == "text Python's documentation, torch 2.13.0"
    apart = dataclasses.replace(record, groups=(NAMES[:4], NAMES[3:]))
    assert [("groups" in bench_markdown(each)) for each in (record, apart)] == [False, True]


def test_svg_has_every_figure_in_bars_proportional_to_speed() -> None:
    svg = bench_svg(full_record())
    picture = ElementTree.fromstring(svg)
    assert {*NAMES, "tf32", "166", "8,230", "1.50x"} <= {text.strip() for text in picture.itertext()}
    assert svg.count("--accent: #") == 2, "light and dark"
    assert "body" not in svg  # the page's own rules stay with the page
    assert bench_svg(full_record()) == svg
    drawn = [path.attrib for path in picture.iter() if path.tag.endswith("path")]
    bars = [path["d"].split() for path in drawn if f"fill: {ACCENT}" in path.get("style", "")]
    widths = [float(right) - float(left) for _, left, _, _, right, *_ in bars]
    assert [fast / slow for slow, fast in itertools.pairwise(widths)] == pytest.approx([1.5] * 6, abs=0.05)
