"""The program that fuzzes: what it asks of an input, and how it reads what the fuzzer says."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

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


def test_what_the_fuzzer_says_is_read(benchmarks: dict[str, Any]) -> None:
    module = benchmarks["fuzz"]
    assert module.read_output(DONE) == (1000, 21, 4, None)
    assert module.read_output(DONE.replace("cov: 21 ft: 23 ", "")) == (1000, 0, 4, None)
    found = module.read_output(WRONG)
    assert found.inputs == 37
    assert found.wrong == "AssertionError: ('bpe-300', 'a') (input in Base64: Cgr/)"
    with pytest.raises(ValueError, match="did not come to its end: ALARM"):
        module.read_output("ALARM: working on the last Unit")


@pytest.mark.skipif(HAS_ATHERIS, reason="atheris is there")
def test_without_atheris_it_says_how_to_get_it(benchmarks: dict[str, Any]) -> None:
    module = benchmarks["fuzz"]
    with pytest.raises(ValueError, match=r"not installed: pip install atheris==3\.0\.0 \(Linux"):
        module.measure(options(module))


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris is not installed")
def test_a_target_and_its_mutant(benchmarks: dict[str, Any]) -> None:
    module = benchmarks["fuzz"]
    report = module.measure(options(module, "--target", "special", "--runs", 2000))
    found = json.loads(report.as_json())["measured"]["special"]
    assert found["inputs"] >= 2000
    assert found["mutant"]["wrong"]


@pytest.mark.parametrize("name", ["encoding", "special", "stream", "recipes", "archive"])
def test_a_target_takes_any_bytes(
    benchmarks: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = benchmarks["fuzz_targets"].TARGETS[name]
    check, draw = target.make(), random.Random(0)
    for seed in target.seeds():
        check(seed)
    for _ in range(100):
        check(draw.randbytes(draw.randrange(60)))


def test_a_wrong_answer_is_seen(benchmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mutant that replaces one function, against an input that shows it."""
    from overnight import config
    from overnight.generation.generate import TextWriter
    from overnight.tokenizer import bpe

    module = benchmarks["fuzz_targets"]
    for place, name, target, data in (
        (bpe, "clean", "encoding", b"\0a\xffb"),
        (TextWriter, "write", "stream", b"\0\0\0\xc3\0\xa9"),
        (config, "_fits", "recipes", b"[schedule]\ntotal_steps = 'x'"),
    ):
        check = module.TARGETS[target].make()
        check(data)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, getattr(place, name))  # put back at the end
            module.TARGETS[target].mutant()
            with pytest.raises((AssertionError, TypeError)):
                check(data)
