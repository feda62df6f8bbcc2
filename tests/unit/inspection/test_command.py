from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from overnight.data.shards import SPLITS, read_manifest
from overnight.inspection import InspectConfig
from overnight.inspection.command import describe, run
from overnight.inspection.statistics import inspect_shards
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig

SENTENCE = "It is well known that the days of the week are seven, and that this is one of them.\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 prepared documents, with shards short enough for a table of them."""
    draw = random.Random(0)
    words = ["the", "of", "and", "a", "house", "on", "hill", "stood", "時", "né", "\x07", "[red]"]
    texts = [SENTENCE + " ".join(draw.choices(words, k=draw.randint(1, 300))) + f" {n}" for n in range(60)]
    monkeypatch.chdir(tmp_path)
    Path("letters.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    paths = {"source": "letters.jsonl", "out": "letters"}
    prepare_shards(PrepareConfig(**paths, tokenizer="characters", validation_fraction=0.2, shard_tokens=2500))
    return tmp_path / "letters"


def printed(capsys: pytest.CaptureFixture[str], config: InspectConfig) -> list[str]:
    capsys.readouterr()
    run(config)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert all(character.isprintable() for line in lines for character in line)
    return lines


def test_inspect_prints_the_manifests_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, InspectConfig(data="letters"))
    manifest = read_manifest(folder)
    for split in SPLITS:
        (row,) = [line.split() for line in lines if line.startswith(split)]
        documents = sum(shard.documents for shard in manifest.shards(split))
        tokens, text_bytes = manifest.tokens(split), manifest.text_bytes(split)
        assert row[1:5] == [f"{documents:,}", f"{tokens:,}", f"{text_bytes:,}", f"{text_bytes / tokens:.3f}"]
    shards = [line.split()[0] for line in lines if line.startswith("  train-")]
    assert shards == [f"train-{number:05d}" for number in range(min(12, len(manifest.train)))]
    assert any("[red]" in line for line in lines)  # rich's markup in a text is text
    assert sum(line.startswith("document ") for line in lines) == 3
    assert lines[-1].startswith("next: overnight train")
    first = printed(capsys, InspectConfig(data="letters", documents=4, samples=0))
    assert any("first 4 documents of each split" in line for line in first)
    assert any(line.startswith("of all 8 documents") for line in first)


@pytest.mark.usefixtures("folder")
def test_inspect_shows_problems_first_and_bars_in_proportion() -> None:
    found = inspect_shards(Path("letters"))
    splits = [dataclasses.replace(split, documents=10**8, tokens=10**11) for split in found.splits]
    duplicates = dataclasses.replace(found.duplicates, validation_in_train=3)
    large = dataclasses.replace(
        found, splits=tuple(splits), problems=("a problem " * 30,), duplicates=duplicates
    )
    lines = list(describe(large))
    assert max(map(cell_len, lines)) <= 80
    assert lines[2].startswith("  ! a problem")
    assert "no document occurs twice, within a split or across splits" in describe(found)
    assert not any("no document is there twice" in line for line in lines)
    bars = [line.count("█") for line in lines if "%" in line and "–" in line]
    counts = [bucket["documents"] for bucket in found.lengths.histogram]
    assert max(bars) == 30
    for bar, count in zip(bars, counts, strict=True):
        assert (bar > 0) == (count > 0)
        assert abs(bar - 30 * count / max(counts)) <= 1


@pytest.mark.usefixtures("folder")
def test_inspect_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run(InspectConfig(data="letters", json=True, samples=2, seed=5))
    content = json.loads(capsys.readouterr().out)
    expected = inspect_shards(Path("letters"), samples=2, seed=5)
    assert content == json.loads(json.dumps(dataclasses.asdict(expected)))
    # The keys that programs read.
    assert list(content) == [
        *("folder", "source", "licence", "tokenizer", "vocab_size", "first_documents_only", "problems"),
        *("splits", "lengths", "duplicates", "ids_used", "frequent", "sampled_documents", "oddities"),
        *("not_english_looking", "samples"),
    ]
    split, lengths = content["splits"][0], content["lengths"]
    assert list(split) == ["split", "documents", "empty_documents", "tokens", "text_bytes", "shards"]
    assert list(split["shards"][0]) == ["name", "documents", "tokens", "text_bytes"]
    assert list(content["duplicates"]) == ["train", "validation", "validation_in_train", "first_in_both"]
    assert list(lengths) == ["mean", "median", "percentile_90", "shortest", "longest", "histogram"]
    assert list(lengths["histogram"][0]) == ["shortest", "longest", "documents"]
    assert list(content["frequent"][0]) == ["id", "text", "count"]
    assert list(content["samples"][0]) == ["split", "document", "tokens", "text", "is_shortened"]


def test_inspect_lists_the_sites_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"url": f"https://site-{n % 25}.{'x' * (n % 25) * 3}.org/{n}", "text": "ab"} for n in range(100)]
    Path("web.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"url": "", "text": "ab"}])))
    lines = printed(capsys, InspectConfig(data="web.jsonl"))
    (row,) = [line.split() for line in lines if line.startswith("site-1.")]
    assert row == ["site-1.xxx.org", "4", "3.96%", "0.00", "3.96%"]
    run(InspectConfig(data="web.jsonl", json=True))
    content = json.loads(capsys.readouterr().out)
    assert list(content)[:4] == ["source", "files", "documents", "text_bytes"]
    assert (content["sites"], content["documents_without"], len(content["top"])) == (25, 1, 25)
    assert list(content["top"][0].items())[1:] == [("documents", 4), ("text_bytes", 8)]


def test_inspect_refuses_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    Path("foreign/train.bin").write_bytes(b"\0\0")
    for config, match in (
        (InspectConfig(data="nothing"), "nothing is neither a folder nor a file"),
        (InspectConfig(data="foreign"), "--from-shards foreign"),
        (InspectConfig(data=".", documents=0, samples=-1), "documents=0 .*samples=-1"),
    ):
        with pytest.raises(ValueError, match=match):
            run(config)


def test_inspect_needs_no_torch(folder: Path) -> None:
    script = (
        "import sys\n"
        "from overnight.cli import main\n"
        "assert main(['inspect', 'letters', '--samples', '1']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
