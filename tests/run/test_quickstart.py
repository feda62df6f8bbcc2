"""The main job, whole: `overnight quickstart` with a small recipe over a small text."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.data import DataConfig
from overnight.data.shards import read_manifest
from overnight.evaluation import compressors
from overnight.quickstart import command as quickstart
from overnight.recipe import Recipe
from overnight.run import train
from overnight.run_directory import RunDirectory

RUN = Path("runs/quickstart")

Start = Callable[..., str]


@pytest.fixture
def start(
    recipe: Callable[..., Recipe],
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Start:
    """Runs the command in an empty folder, with changes to its recipe; returns what it said."""
    monkeypatch.chdir(tmp_path)
    text = DataConfig(data=str(prepared.parent), tokenizer="characters", validation_fraction=0.2)

    def run(fresh: bool = False, **changes: object) -> str:
        recipes = {"quickstart": recipe(run_name="quickstart", data=text, **changes)}
        monkeypatch.setattr(quickstart, "load_recipe", recipes.__getitem__)
        quickstart.run(quickstart.QuickstartConfig(fresh=fresh))
        out, said = capsys.readouterr()
        assert out == ""
        return said

    return run


def steps() -> list[int]:
    return [line["step"] for line in RunDirectory(RUN).read_metrics()]


def test_it_ends_with_everything_one_wants_to_know(start: Start) -> None:
    said = start()
    directory = RunDirectory(RUN)
    evaluation, sample = directory.read_events("evaluations")[-1], directory.read_events("samples")[-1]
    assert steps() == list(range(1, 13))
    assert evaluation["step"] == sample["step"] == 12
    assert f"validation loss   {evaluation['loss']:.4f} nats per token" in said

    compression = json.loads((RUN / "compression.json").read_text())
    (prepared_here,) = Path("data").glob("*-characters")
    assert compression["bytes"] == read_manifest(prepared_here).text_bytes("validation")
    rivals = compression["bits_per_byte"]
    assert list(rivals) == ["gzip", "bz2", "xz", "xz given the training text"]
    for name, value in {**rivals, "this GPT-2": evaluation["bits_per_byte"]}.items():
        assert re.search(rf"^ +{name} +{value:.3f}(  <-)?$", said, re.MULTILINE), name

    speed = statistics.median(line["tokens_per_second"] for line in directory.read_metrics())
    assert f"{speed:,.0f} tokens per second" in said
    assert "".join((sample["prompt"] + sample["completion"]).split())[:8] in "".join(said.split())
    assert "report            runs/quickstart/report.html" in said
    assert (RUN / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert said.splitlines()[-1].startswith("next: overnight generate runs/quickstart")


def test_a_second_time_it_says_what_it_reuses_and_trains_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(compressors, "compressed_bits_per_byte", lambda *_: pytest.fail("compressed again"))
    second = start()
    assert "reusing runs/quickstart, trained for all of its 12 steps; --fresh starts over" in second
    results = first[first.index("validation loss   ") :]
    assert second.endswith(results)
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_killed_in_the_middle_it_goes_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunDirectory.append_metrics

    def killed(self: RunDirectory, line: dict[str, float]) -> None:
        append(self, line)
        if line["step"] == 8:
            raise MemoryError("stands for a kill")

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "append_metrics", killed)
        with pytest.raises(MemoryError):
            start()
    said = start()
    assert "going on with runs/quickstart, which has done 8 of its 12 steps; --fresh starts over" in said
    assert steps() == list(range(1, 13))


def test_killed_after_the_last_step_and_before_its_checkpoint_it_is_not_finished(start: Start) -> None:
    whole = start()
    shutil.rmtree(RUN / "checkpoints" / "step-00000012")
    for name in ("evaluations", "samples"):
        path = RUN / "events" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    said = start()
    assert "going on with runs/quickstart, which has done 12 of its 12 steps" in said
    assert steps() == list(range(1, 13))
    for words in ("validation loss   ", "a sample  "):  # the final ones, and not those before
        (line,) = [line for line in whole.splitlines() if line.startswith(words)]
        assert line in said.splitlines()


def test_fresh_starts_over(start: Start) -> None:
    start()
    (RUN / "from-before").touch()
    said = start(fresh=True)
    assert "reusing" not in said
    assert not (RUN / "from-before").exists()
    assert steps() == list(range(1, 13))


def test_another_recipe_is_refused(start: Start, recipe: Callable[..., Recipe]) -> None:
    start()
    wider = dataclasses.replace(recipe().model, n_embd=32)
    with pytest.raises(ValueError, match="another recipe, which differs in n_embd: .* --fresh") as error:
        start(model=wider)
    assert "\n" not in str(error.value)
    start(fresh=True, model=wider)


def test_a_missing_matplotlib_is_told_before_any_work(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[report\]'"):
        start()
    assert list(Path().iterdir()) == []
