"""The programs that fuzz, and that kill a preparation: what they ask, and that they see a wrong answer."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
DONE = """#2	INITED cov: 19 ft: 19 corp: 1/1b exec/s: 0 rss: 116Mb
#1000	DONE   cov: 21 ft: 23 corp: 4/7b lim: 11 exec/s: 0 rss: 117Mb
Done 1000 runs in 0 second(s)
"""
WRONG = """wrong at input 37: AssertionError: ('bpe-300', 'a')
 === Uncaught Python exception: ===
Base64: Cgr/
"""


def options(module: Any, *words: object) -> Any:
    return module.read_options([str(word) for word in words])


def test_fuzzer_output_is_read(programs: dict[str, Any]) -> None:
    module = programs["fuzz"]
    assert module.read_output(DONE) == (1000, 21, 4, None)
    assert module.read_output(DONE.replace("cov: 21 ft: 23 ", "")) == (1000, 0, 4, None)
    found = module.read_output(WRONG)
    assert found.inputs == 37
    assert found.wrong == "AssertionError: ('bpe-300', 'a') (input in Base64: Cgr/)"
    with pytest.raises(ValueError, match="ALARM"):
        module.read_output("ALARM: working on the last Unit")


@pytest.mark.skipif(HAS_ATHERIS, reason="atheris is installed")
def test_fuzz_without_atheris_names_package(programs: dict[str, Any]) -> None:
    module = programs["fuzz"]
    with pytest.raises(ValueError, match=r"pip install atheris"):
        module.measure(options(module))


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris is not installed")
def test_fuzz_target_and_mutant(programs: dict[str, Any]) -> None:
    module = programs["fuzz"]
    report = module.measure(options(module, "--target", "special", "--runs", 2000))
    found = json.loads(report.as_json())["measured"]["special"]
    assert found["inputs"] >= 2000
    assert found["mutant"]["wrong"]


@pytest.mark.parametrize("name", ["encoding", "special", "stream", "recipes", "archive"])
def test_fuzz_target_takes_any_bytes(
    programs: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = programs["fuzz_targets"].TARGETS[name]
    check, draw = target.make(), random.Random(0)
    for seed in target.seeds():
        check(seed)
    for _ in range(100):
        check(draw.randbytes(draw.randrange(60)))


@pytest.mark.parametrize(
    ("replaced", "target", "data"),
    [
        ("overnight.tokenizer.bpe:clean", "encoding", b"\0a\xffb"),
        ("overnight.generation.generate:TextWriter.write", "stream", b"\0\0\0\xc3\0\xa9"),
        ("overnight.config:_fits", "recipes", b"[schedule]\ntotal_steps = 'x'"),
    ],
)
def test_fuzz_mutants_are_caught(
    programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, replaced: str, target: str, data: bytes
) -> None:
    """Negative control: each mutant that replaces one function, with an input that shows it."""
    owner, name = programs["mutants"].resolve(replaced)
    real = getattr(owner, name)
    module = programs["fuzz_targets"]
    check = module.TARGETS[target].make()
    check(data)
    try:
        module.TARGETS[target].mutant()
        with pytest.raises((AssertionError, TypeError)):
            check(data)
    finally:
        programs["mutants"].replace(replaced, real)


# A preparation of a real corpus, killed at random moments (killed.py)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two Parquet files of 200 documents together."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        texts = [f"the corpus of a test holds {number} {row} " * (row % 7 + 1) for row in range(100)]
        parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
    return folder


def test_killed_preparation_is_equal_and_difference_is_noticed(
    programs: dict[str, Any], corpus: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = programs["killed"]
    asked = options(module, "--corpus", corpus, "--bpe", shared_data / "gpt2-bpe", "--kills", 2)
    report = module.measure(asked)
    assert report.measured["kills"] == 2
    assert report.measured["completed"] >= 1
    real = module.digest
    monkeypatch.setattr(module, "digest", lambda folder: real(folder) + "another")
    with pytest.raises(ValueError, match="differs"):
        module.measure(asked)


def test_killed_reports_failing_command(programs: dict[str, Any]) -> None:
    """A command that fails would otherwise be repeated for ever."""
    with pytest.raises(ValueError, match="status 1"):
        programs["killed"].kill_after(["false"], None)
    assert programs["killed"].kill_after(["sleep", "60"], 0.05)


def test_leftovers_beside_prepared_folder_are_found(programs: dict[str, Any], tmp_path: Path) -> None:
    module = programs["faults_corpus"]
    out = module.make_corpus(tmp_path / "out", seed=1, text_bytes=20_000)
    expected = module.digest(out)
    (tmp_path / ".out.lock").touch()
    assert module.find_wrong(out, expected) is None
    (tmp_path / ".out.partial").mkdir()
    assert ".out.partial" in module.find_wrong(out, expected)
    (out / "9.txt").write_text("other")
    assert "differs" in module.find_wrong(out, expected)
