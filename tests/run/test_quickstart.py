"""`overnight quickstart`, whole, with a small recipe on a small text."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from overnight.data import DataConfig
from overnight.data.shards import read_manifest
from overnight.evaluation import compressors
from overnight.quickstart import QuickstartConfig
from overnight.quickstart import command as quickstart
from overnight.run_directory import RunDirectory

RUN = Path("runs/quickstart")


@pytest.fixture
def start(recipe, prepared, here, monkeypatch, capsys):
    """start(fresh, **changes of the recipe): the command in an empty folder; returns its output."""
    text = DataConfig(data=str(prepared.parent), tokenizer="characters", validation_fraction=0.2)

    def run(fresh: bool = False, **changes: object) -> str:
        recipes = {"quickstart": recipe(run_name="quickstart", data=text, **changes)}
        monkeypatch.setattr(quickstart, "load_recipe", recipes.__getitem__)
        quickstart.run(QuickstartConfig(fresh=fresh))
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


def steps() -> list[int]:
    return [line["step"] for line in RunDirectory(RUN).read_metrics()]


ALL_STEPS = list(range(1, 13))


def test_quickstart_trains_prints_results_and_is_reused(start, monkeypatch):
    err = start()
    directory = RunDirectory(RUN)
    evaluation, sample = directory.read_events("evaluations")[-1], directory.read_events("samples")[-1]
    assert steps() == ALL_STEPS
    assert evaluation["step"] == sample["step"] == 12
    compression = json.loads((RUN / "compression.json").read_text())
    (prepared_here,) = Path("data").glob("*-characters")
    assert compression["bytes"] == read_manifest(prepared_here).text_bytes("validation")
    bits = compression["bits_per_byte"]
    assert list(bits) == ["gzip", "bz2", "xz", "xz given the training text"]
    for name, value in {**bits, "this model": evaluation["bits_per_byte"]}.items():
        assert re.search(rf"^ +{name} +{value:.3f}(  <-)?$", err, re.MULTILINE), name
    speed = statistics.median(line["tokens_per_second"] for line in directory.read_metrics())
    for shown in (f"{evaluation['loss']:.4f} nats", f"{speed:,.0f} tokens per second", f"{RUN}/report.html"):
        assert shown in err
    assert "".join((sample["prompt"] + sample["completion"]).split())[:8] in "".join(err.split())
    assert (RUN / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert err.splitlines()[-1].startswith("next: overnight generate runs/quickstart")

    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for module, name in ((quickstart, "train_recipe"), (compressors, "compressed_bits_per_byte")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("done again"))
    again = start()
    assert again.startswith("reusing runs/quickstart, ")
    assert again.endswith(err[err.index("validation loss   ") :])
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_killed_quickstart_is_resumed(start, kill_at):
    kill_at(8, start)
    assert "8 of 12 steps" in start()
    assert steps() == ALL_STEPS


def test_quickstart_killed_before_its_last_checkpoint_is_resumed(start):
    whole = start()
    shutil.rmtree(RUN / "checkpoints" / "step-00000012")
    (RUN / "record.json").unlink()  # as after a kill while it was replaced
    for name in ("evaluations", "samples"):
        path = RUN / "events" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    err = start()
    assert "12 of 12 steps" in err
    assert steps() == ALL_STEPS
    for words in ("validation loss   ", "a sample  "):  # the last ones, not those before
        (line,) = [line for line in whole.splitlines() if line.startswith(words)]
        assert line in err.splitlines()


def test_fresh_starts_over_also_with_another_recipe(start, recipe):
    start()
    wider = dataclasses.replace(recipe().model, n_embd=32)
    with pytest.raises(ValueError, match="n_embd: .* --fresh"):
        start(model=wider)
    (RUN / "from-before").touch()
    assert "reusing" not in start(fresh=True, model=wider)
    assert not (RUN / "from-before").exists()
    assert steps() == ALL_STEPS


def test_missing_matplotlib_is_reported_before_any_work(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[report\]'"):
        start()
    assert list(Path().iterdir()) == []
