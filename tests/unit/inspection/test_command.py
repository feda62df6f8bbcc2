from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from overnight.data.shards import read_manifest
from overnight.inspection import InspectConfig
from overnight.inspection.command import describe_shards, run
from overnight.inspection.statistics import inspect_shards
from overnight.preparation import command as preparation_command
from overnight.preparation.prepare_config import PrepareConfig

LETTERS = "It is well known that the days of the week are seven, and that this is one of them.\n"


def texts() -> list[str]:
    draw = random.Random(0)
    words = ["the", "of", "and", "a", "house", "on", "hill", "stood", "時", "né", "\x07", "[red]"]
    return [
        LETTERS + " ".join(draw.choices(words, k=draw.randint(1, 300))) + f" {number}" for number in range(60)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared by the command's own stage, with shards short enough for a table of them."""
    monkeypatch.chdir(tmp_path)
    Path("letters.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    config = PrepareConfig(
        source="letters.jsonl",
        tokenizer="characters",
        validation_fraction=0.2,
        shard_tokens=2500,
        out="letters",
    )
    preparation_command.run(config)
    return tmp_path / "letters"


def shown(capsys: pytest.CaptureFixture[str], config: InspectConfig) -> list[str]:
    capsys.readouterr()
    run(config)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_it_tells_what_the_manifest_says_in_eighty_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, InspectConfig(data="letters"))
    manifest = read_manifest(folder)
    assert max(map(cell_len, lines)) <= 80
    assert all(character.isprintable() for line in lines for character in line)
    assert "letters: letters (licence: not stated) in ids of characters" in lines
    assert "every shard is as its manifest says" in lines
    assert "no document is there twice, within a split or across both" in lines
    for split in ("train", "validation"):
        (row,) = [line.split() for line in lines if line.startswith(split)]
        held = manifest.shards(split)
        documents = sum(shard.documents for shard in held)
        assert row[1:4] == [
            f"{documents:,}",
            f"{manifest.tokens(split):,}",
            f"{manifest.text_bytes(split):,}",
        ]
        assert row[4] == f"{manifest.text_bytes(split) / manifest.tokens(split):.3f}"
    rows = [line.split() for line in lines if line.startswith("  train-")]
    assert [row[0] for row in rows] == [f"train-{number:05d}" for number in range(len(rows))]
    more = max(0, len(manifest.train) - 12)
    assert len(rows) == len(manifest.train) - more
    assert (f"  and {more} shards more (--json tells all)" in lines) == (more > 0)
    assert "of all 60 documents (read up to 100,000 tokens each)" in lines
    assert sum(line.startswith("document ") for line in lines) == 3
    assert any("[red]" in text for text in texts())
    assert "top domains: none, for shards hold no addresses; name the source instead" in lines
    assert lines[-1] == "next: overnight train RECIPE --data letters"


def test_a_leak_is_said_before_everything_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_shards(Path(folder.name))
    leak = dataclasses.replace(
        found,
        problems=("3 of 9 validation documents are also in training",),
        duplicates=dataclasses.replace(found.duplicates, validation_in_train=3),
    )
    lines = list(describe_shards(leak))
    assert lines[2] == "! 3 of 9 validation documents are also in training"
    assert "no document is there twice, within a split or across both" not in lines


def test_the_histogram_s_bars_are_in_proportion(folder: Path) -> None:
    found = inspect_shards(Path(folder.name))
    bars = [line.count("█") for line in describe_shards(found) if "%" in line and "–" in line]
    counts = [bucket.documents for bucket in found.lengths.histogram]
    assert len(bars) == len(counts)
    assert max(bars) == 30
    for bar, count in zip(bars, counts, strict=True):
        assert (bar > 0) == (count > 0)
        assert abs(bar - 30 * count / max(counts)) <= 1


@pytest.mark.parametrize("documents", [10**6, 10**8])
def test_large_numbers_keep_to_the_width(folder: Path, documents: int) -> None:
    found = inspect_shards(Path(folder.name))
    splits = [
        dataclasses.replace(split, documents=documents, tokens=1000 * documents, text_bytes=400 * documents)
        for split in found.splits
    ]
    large = dataclasses.replace(found, splits=tuple(splits), problems=("a problem " * 30,))
    assert max(map(cell_len, describe_shards(large))) <= 80


def test_json_is_one_object_with_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run(InspectConfig(data="letters", json=True, samples=2, seed=5))
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(
        json.dumps(dataclasses.asdict(inspect_shards(Path(folder.name), samples=2, seed=5)))
    )
    assert len(told["splits"][0]["shards"]) == len(read_manifest(folder).train)
    assert len(told["samples"]) == 2


def test_the_first_documents_are_said_to_be_all_that_was_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, InspectConfig(data="letters", documents=4, samples=0))
    assert "looked at the first 4 documents of each split only; all that follows is of those" in lines
    assert "of all 8 documents (read up to 100,000 tokens each)" in lines


def test_a_source_has_its_sites_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"url": f"https://site-{n % 25}.{'x' * (n % 25) * 3}.org/{n}", "text": "ab"} for n in range(100)]
    Path("web.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"url": "", "text": "ab"}])))
    lines = shown(capsys, InspectConfig(data="web.jsonl"))
    assert max(map(len, lines)) <= 80
    assert "web.jsonl: 101 documents, 0.00 MB of text, from 25 sites" in lines
    assert "1 documents (0.99%) name no site" in lines
    (row,) = [line.split() for line in lines if line.startswith("site-1.")]
    assert row == ["site-1.xxx.org", "4", "3.96%", "0.00", "3.96%"]
    assert "and 5 sites more" in lines
    run(InspectConfig(data="web.jsonl", json=True))
    told = json.loads(capsys.readouterr().out)
    assert (told["sites"], len(told["top"]), told["top"][0]["documents"]) == (25, 25, 4)


def test_wrong_use_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    Path("foreign/train.bin").write_bytes(b"\0\0")
    for config, message in [
        (InspectConfig(data="nothing"), "there is no folder or file nothing; give a folder that"),
        (InspectConfig(data="foreign"), "`overnight prepare --from-shards foreign`"),
        (InspectConfig(data=".", documents=0, samples=-1), "documents=0 must .*; samples=-1 must"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(config)


def test_it_needs_no_torch(folder: Path) -> None:
    script = (
        "import sys\n"
        "from overnight.cli import main\n"
        "assert main(['inspect', 'letters', '--samples', '1']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
