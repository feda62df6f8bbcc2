"""Fuzzing the whole command: any prompt and any settings are completed, or refused in one sentence."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight.conversion.open_model import OpenedModel
from overnight.generation import GenerateConfig, SamplingConfig
from overnight.generation import command as generation_command
from overnight.generation.quantize import generation_precisions
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.options import from_arguments
from overnight.tokenizer.open_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("bpe-270", ["the quick brown fox jumps over the lazy dog"] * 9)
NUMBERS = (0.0, -0.0, 1.0, 0.7, 2.0, -1.0, 1e-320, 5e-324, 1e308, 1e-30, math.nan, math.inf, -math.inf)
COUNTS = (None, 0, 1, 2, 40, 50_257, -1, 2**31, 2**63, 10**30)
HOSTILE = ("", " ", "\0", "<|endoftext|>", "\ud83d", "\udfff", "\x1b[2J\x07", "é🙂中", "\u202e", "\n" * 9)
SHELL = ("-- --json", "{0.__class__}", "%s%n", "../../etc/passwd")
PROMPTS = (*HOSTILE, *SHELL, "the quick", "x" * 15, "x" * 17, "x" * 10_000, "🙂" * 40)

Run = Callable[[GenerateConfig], tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with a model of context 16; returns its output and its error message, or ""."""

    def open_model(name: str) -> OpenedModel:
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "context_length": 16}
        model = GPT(ModelConfig(**sizes, vocab_size=TOKENIZER.vocab_size))
        initialize(model, seed=1)
        here = Path(name)
        return OpenedModel(
            model=model.eval(),
            tokenizer=TOKENIZER,
            origin=here,
            tokenizer_folder=here,
            run=None,
            end_ids=frozenset([TOKENIZER.end_of_text]),
        )

    monkeypatch.setattr(generation_command, "open_model", open_model)

    def run(config: GenerateConfig) -> tuple[str, str]:
        message = ""
        try:
            generation_command.run(config)
        except ValueError as error:
            message = str(error) or "nothing"
        return capsys.readouterr().out, message

    return run


def hostile(draw: random.Random) -> GenerateConfig:
    """Mostly valid values, with some that are not."""

    def one(valid: Any, others: tuple[Any, ...]) -> Any:
        return draw.choice(others) if draw.random() < 0.3 else valid

    prompt = "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(6)))
    prompts = tuple(draw.choice((*PROMPTS, prompt)) for _ in range(draw.choice((0, 1, 1, 1, 3))))
    return GenerateConfig(
        model="tiny",
        prompts=prompts,
        max_new_tokens=one(draw.randrange(1, 24), (0, -1, -(10**30))),
        temperature=one(1.0, NUMBERS),
        top_k=one(None, COUNTS),
        top_p=one(None, (None, *NUMBERS)),
        seed=one(0, (-1, 2**63, 10**40)),
        samples=one(1, (0, -5, 2, 9)),
        stop=tuple(draw.choice(PROMPTS) for _ in range(one(0, (1, 2)))),
        json=draw.random() < 0.5,
        device=one("cpu", ("", "cuda:99", "cpu;rm", "cp\0u", "meta")),
        precision=one(generation_precisions("cpu")[0], (*generation_precisions("cpu"), "fp64")),
    )


def is_answered(run: Run, config: GenerateConfig) -> bool:
    """True if completed, False if refused before any output; anything else raises."""
    written, message = run(config)
    assert "\n" not in message
    assert not (message and written)
    written.encode()
    if config.json:
        for line in written.splitlines():
            assert 0 <= json.loads(line)["tokens"] <= config.max_new_tokens
    return not message


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_generate_answers_or_refuses_any_request(
    run: Run, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = sum(is_answered(run, hostile(random.Random(seed))) for seed in range(count))
    assert count // 10 < answered < count - count // 10
    for prompt in PROMPTS:
        config = GenerateConfig(model="tiny", prompts=(prompt,), max_new_tokens=3, device="cpu", json=True)
        is_too_long = len(TOKENIZER.encode(prompt)) > 16
        assert is_answered(run, config) == (not is_too_long)
    # The negative control: without validation, the command crashes.
    wrong = GenerateConfig(model="tiny", max_new_tokens=3, device="cpu", top_k=-1)
    assert not is_answered(run, wrong)
    monkeypatch.setattr(SamplingConfig, "problems", lambda self: [])
    with pytest.raises(RuntimeError):
        is_answered(run, wrong)


def test_generate_checks_all_prompts_before_the_first_batch(run: Run) -> None:
    config = GenerateConfig(model="tiny", prompts=("the",) * 9 + ("x" * 99,), max_new_tokens=2, device="cpu")
    written, message = run(config)
    assert "prompt 10" in message
    assert written == ""


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (["-"], b"the quick\n\nbrown\n", ["the quick\n\nbrown"]),
        (["--", "-"], b"\xef\xbb\xbfthe\r\nfox", ["the\nfox"]),
        (["--prompt-file", "-"], b"the quick\n\n \nfox", ["the quick", "fox"]),
        (["--prompt-file=FILE"], b"the\r\n fox \r\n", ["the", " fox "]),
        (["--", "-", "--prompt-file"], b"", ["-", "--prompt-file"]),
        (["-"], b"\n", "standard input holds no prompt: it is empty"),
        (["--prompt-file", "FILE"], b"", "FILE holds no prompt: it is empty"),
        (["--prompt-file", "FILE"], b"\xff", "FILE is not UTF-8: invalid start byte at byte 0"),
        (["--prompt-file", "nowhere"], b"", "nowhere cannot be read: No such file or directory"),
        (["--prompt-file", "FILE", "the"], b"fox", "not both"),
        (["--", "--json"], b"", ["--json"]),
    ],
)
def test_prompts_are_read_from_files_and_standard_input(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    content: bytes,
    expected: list[str] | str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    options = ["tiny", "--json", "--max-new-tokens", "2", "--device", "cpu"]
    config = from_arguments(GenerateConfig, [*options, *words], prog="overnight generate", about="")
    output, message = run(config)
    if isinstance(expected, str):
        assert expected in message
        assert not output
    else:
        assert not message
        assert [json.loads(line)["prompt"] for line in output.splitlines()] == expected


@pytest.mark.parametrize("stop", [["--stop", "a", "b"], ["--stop=a", "--stop=b"]])
def test_words_after_two_dashes_are_prompts_also_after_a_list(stop):
    words = ["tiny", *stop, "--", "-- SELECT 1", "--stop"]
    config = from_arguments(GenerateConfig, words, prog="overnight generate", about="")
    assert (config.prompts, config.stop) == (("-- SELECT 1", "--stop"), ("a", "b"))
    with pytest.raises(ValueError, match="--json"):  # named as it was written
        from_arguments(SamplingConfig, ["--", "--json"], prog="overnight x", about="")
