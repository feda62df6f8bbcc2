"""The programs that prepare a corpus: beside their peers, and killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

WORDS = "the corpus of a test holds a few words"


@pytest.fixture
def bpe(shared_data: Path) -> Path:
    return shared_data / "gpt2-bpe"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two Parquet files of 200 documents together, and a text between them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        texts = [f"{WORDS} {number} {row} " * (row % 7 + 1) for row in range(100)]
        parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
    return folder


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A checkout whose program writes as many tokens as it finds documents, through `datasets`' door."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "fineweb.py").write_text(
        "import os, datasets\n"
        "documents = datasets.load_dataset('theirs', name='sample', split='train')\n"
        "place = os.path.join(os.path.dirname(__file__), 'edufineweb_val_000000.npy')\n"
        "open(place, 'wb').write(bytes(128 + 2 * len(documents)))\n"
    )
    return folder


def options(module: Any, *words: object) -> Any:
    return module.read_options([str(word) for word in words])


def test_a_corpus_is_prepared_and_counted(benchmarks: dict[str, Any], corpus: Path, bpe: Path) -> None:
    report = benchmarks["corpus"].measure(
        options(benchmarks["corpus"], "--corpus", corpus, "--bpe", bpe, "--repeats", 1)
    )
    ((name, *_, ratio, _peak),) = report.rows
    assert (name, ratio) == ("overnight", "1.00x as fast")
    (run,) = report.measured["overnight"]
    assert run["tokens"] > 200 * len(WORDS.split())
    assert run["seconds"] > 0


def test_a_peer_reads_the_corpus_in_the_place_of_its_own(
    benchmarks: dict[str, Any], corpus: Path, bpe: Path, peer: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """`datasets` is stood in for: what is tried is how the program is started, and what is counted."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "datasets.py").write_text(
        "from pyarrow import parquet\n"
        "def load_dataset(kind, data_files, columns, split):\n"
        "    assert (kind, columns, split) == ('parquet', ['text'], 'train')\n"
        "    return [row for file in data_files['train'] for row in parquet.read_table(file).to_pylist()]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    files = sorted(corpus.glob("*.parquet"))
    took = benchmarks["corpus"].prepare_theirs(peer / "fineweb.py", files, bpe)
    assert took.tokens == 200
    (peer / "fineweb.py").write_text("raise SystemExit('no disk')")
    with pytest.raises(ValueError, match="no disk"):
        benchmarks["corpus"].prepare_theirs(peer / "fineweb.py", files, bpe)


def test_a_folder_that_is_none_is_refused(benchmarks: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    module = benchmarks["corpus"]
    with pytest.raises(ValueError, match=r"holds no \.parquet file"):
        module.measure(options(module, "--corpus", tmp_path, "--bpe", tmp_path))
    with pytest.raises(ValueError, match=r"there is no fineweb\.py in .*; give the folder that holds one"):
        module.measure(options(module, "--corpus", corpus, "--bpe", tmp_path, "--peer", tmp_path))


def test_killed_it_goes_on_and_a_difference_is_noticed(
    benchmarks: dict[str, Any], corpus: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmarks["killed"]
    asked = options(module, "--corpus", corpus, "--bpe", bpe, "--kills", 2)
    report = module.measure(asked)
    assert json.loads(report.as_json())["measured"]["kills"] == 2
    assert report.measured["completed"] >= 1
    real = module.digest
    monkeypatch.setattr(module, "digest", lambda folder: real(folder) + "another")
    with pytest.raises(ValueError, match="the folder differs from one written in peace"):
        module.measure(asked)


def test_a_command_that_fails_is_told(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    """Or the same command would be given for ever."""
    with pytest.raises(ValueError, match="ended with status 1"):
        benchmarks["killed"].kill_after(["false"], None)
    assert benchmarks["killed"].kill_after(["sleep", "60"], 0.05)


def test_what_is_left_beside_a_folder_is_told(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    corpus = benchmarks["faults_corpus"]
    out = corpus.make_corpus(tmp_path / "out", seed=1, text_bytes=20_000)
    assert len([path for path in out.rglob("*") if path.is_file()]) == len(corpus.NAMES)
    expected = corpus.digest(out)
    (tmp_path / ".out.lock").touch()
    assert corpus.find_wrong(out, expected) is None
    (tmp_path / ".out.partial").mkdir()
    assert corpus.find_wrong(out, expected) == "left beside the folder: .out.partial"
    (out / "9.txt").write_text("other")
    assert corpus.find_wrong(out, expected) == "the folder differs from one written in peace"
