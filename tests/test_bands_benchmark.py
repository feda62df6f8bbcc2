"""What could make a recorded band lie: runs trained again, of two recipes, or that judge themselves."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from overnight.baselines.band import Point, find_band, read_band
from overnight.data.dataset import open_one_dataset
from overnight.recipe import flatten

RECIPE = """
[data]
data = "text"
tokenizer = "characters"
validation_fraction = 0.2
[model]
n_layer = 1
n_head = 1
n_embd = 8
context_length = 16
[schedule]
total_steps = 6
[batch]
tokens_per_step = 64
[compute]
device = "cpu"
precision = "fp32"
compile = false
"""


@pytest.fixture
def bands(benchmarks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, in a folder with a small recipe and its text."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(20):
        Path("text", f"{number}.txt").write_text(f"document {number} of {number * number}\n" * 5)
    Path("small.toml").write_text(RECIPE)
    return benchmarks["bands"]


def test_a_band_is_that_of_the_seeds_runs(bands: Any) -> None:
    words = ["--recipe", "small.toml", "--seeds", "3", "--evaluations", "2", "--write", "small.json"]
    report = bands.record(bands.read_options(words))
    band = read_band(Path("small.json").read_text())
    runs = [bands.read(bands.RunDirectory(Path(f"runs/bands/small-{seed}"))) for seed in (1, 2, 3)]
    assert [run.seed for run in runs] == [1, 2, 3]
    assert band.source == "3 recorded runs"
    assert find_band(flatten(runs[0].recipe), runs[0].text, [band]) is band
    last = [run.course["validation_loss"][-1] for run in runs]
    assert {point.tokens for point in last} == {6 * 64}
    reference = band.curves["validation_loss"].at(6 * 64)
    assert reference is not None
    assert reference.middle == pytest.approx(sum(point.value for point in last) / 3, rel=1e-5)
    assert [row[:2] for row in report.rows] == [
        [str(run.seed), f"{point.value:.4f}"] for run, point in zip(runs, last, strict=True)
    ]
    assert "Healthy runs of small" in report.as_markdown()

    written = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("metrics.jsonl")}
    bands.record(bands.read_options(words))  # what is finished is taken as it is
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_other_versions_of_a_text_get_room_and_need_no_fingerprint(bands: Any) -> None:
    for name, share in (("one.json", []), ("all.json", ["--other-versions", "0.02"])):
        words = ["--recipe", "small.toml", "--seeds", "2", "--evaluations", "2", "--write", name, *share]
        bands.record(bands.read_options(words))
    one, every = (read_band(Path(name).read_text()) for name in ("one.json", "all.json"))
    assert set(one.text) - set(every.text) == {"tokenizer_fingerprint"}
    for name, of in (("loss", "loss"), ("validation_loss", "validation_loss"), ("gap", "validation_loss")):
        room = 0.02 * one.curves[of].middle[-1]
        assert every.curves[name].high[-1] == pytest.approx(one.curves[name].high[-1] + room, abs=1e-5)
        assert every.curves[name].low[-1] == pytest.approx(one.curves[name].low[-1] - room, abs=1e-5)
    assert every.curves["grad_norm"] == one.curves["grad_norm"]
    assert every.notes.endswith("widened by 2%, for the text differs a little with its version.")


def test_unigram_nats_are_the_entropy_of_the_training_ids(bands: Any) -> None:
    recipe = bands.replace(bands.load_recipe("small.toml"), seed=1)
    run = bands.read(bands.train(recipe, Path("runs"), 1))
    dataset = open_one_dataset(run.recipe.data)
    stream = dataset.stream("train", 1, 0)
    counts: Counter[int] = Counter()
    for batch in stream.evaluation_batches(64):
        counts.update(batch.targets.flatten().tolist())
    counts[dataset.tokenizer.end_of_text] += 1  # the first id is no target
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert bands.unigram_nats(run) == pytest.approx(entropy)


def test_a_run_is_held_beside_the_others_only(bands: Any) -> None:
    def run(value: float) -> Any:
        course = {name: (Point(64, value),) for name in ("loss", "validation_loss")}
        return bands.Run(1, None, {}, course)

    runs = [run(value) for value in (4.0, 4.0, 8.0)]
    assert float(bands.hold_out(runs, 2)[-1]) == pytest.approx((8 - 4) / 0.04)  # they differ by nothing
    assert float(bands.hold_out(runs, 0)[-1]) < 1  # with itself among them, each would lie nearer still


def test_runs_of_two_recipes_or_texts_make_no_band(bands: Any) -> None:
    recipe = bands.load_recipe("small.toml")
    text = dict.fromkeys(bands.TEXT, "x") | {"train": (), "vocab_size": 4}
    one = bands.Run(1, recipe, text, {})
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout=0.1))
    with pytest.raises(ValueError, match="of seeds 1 and 2 are not of one recipe"):
        bands.build_band("small", [one, bands.Run(2, other, text, {})])
    with pytest.raises(ValueError, match="of seeds 1 and 2 are not on one text"):
        bands.build_band("small", [one, bands.Run(2, recipe, text | {"source": "y"}, {})])
    with pytest.raises(ValueError, match="--seeds 1 is too few"):
        bands.record(bands.read_options(["--recipe", "small.toml", "--seeds", "1"]))
