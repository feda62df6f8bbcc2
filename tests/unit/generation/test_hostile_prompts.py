"""Any prompt with any way of sampling is answered or refused in a sentence: the command in full."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overnight.conversion import open_model as open_model_module
from overnight.conversion.open_model import OpenedModel
from overnight.generation import GenerateConfig, SamplingConfig
from overnight.generation import command as generation_command
from overnight.generation.quantize import generation_precisions
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("bpe-270", ["the quick brown fox jumps over the lazy dog"] * 9)
NUMBERS = (
    0.0,
    -0.0,
    1.0,
    0.7,
    2.0,
    -1.0,
    1e-320,
    5e-324,
    1e308,
    1e-30,
    float("nan"),
    float("inf"),
    -float("inf"),
)
COUNTS = (None, 0, 1, 2, 40, 50_257, -1, 2**31, 2**63, 10**30)
PROMPTS = (
    *(
        "",
        " ",
        "\0",
        "the quick",
        "<|endoftext|>",
        "\ud83d",
        "\udfff",
        "\x1b[2J\x07",
        "é🙂中",
        "\u202e",
        "\n" * 9,
    ),
    *("x" * 15, "x" * 17, "x" * 10_000, "🙂" * 40, "-- --json", "{0.__class__}", "%s%n", "../../etc/passwd"),
)

Run = Callable[[GenerateConfig], tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What the command writes with a model of 16 tokens of context, and with what sentence it refuses."""

    def open_model(name: str) -> OpenedModel:
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "context_length": 16}
        model = GPT(ModelConfig(**sizes, vocab_size=TOKENIZER.vocab_size))
        initialize(model, seed=1)
        here = Path(name)
        return OpenedModel(
            model=model.eval(), tokenizer=TOKENIZER, origin=here, tokenizer_folder=here, run=None
        )

    monkeypatch.setattr(open_model_module, "open_model", open_model)

    def run(config: GenerateConfig) -> tuple[str, str]:
        said = ""
        try:
            generation_command.run(config)
        except ValueError as error:
            said = str(error) or "nothing"
        return capsys.readouterr().out, said

    return run


def hostile(draw: random.Random) -> GenerateConfig:
    """Mostly sound values, with some that are not."""

    def one(sound: Any, others: tuple[Any, ...]) -> Any:
        return draw.choice(others) if draw.random() < 0.3 else sound

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


def answer(run: Run, config: GenerateConfig) -> bool:
    """True if it was answered, False if refused before a word. Whatever else happens is raised."""
    written, said = run(config)
    assert "\n" not in said
    assert not (said and written)
    written.encode()
    if config.json:
        for line in written.splitlines():
            assert 0 <= json.loads(line)["tokens"] <= config.max_new_tokens
    return not said


def ask(run: Run, count: int) -> int:
    """How many of so many were answered."""
    return sum(answer(run, hostile(random.Random(seed))) for seed in range(count))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_anything_asked_is_answered_or_refused(run: Run, count: int) -> None:
    answered = ask(run, count)
    assert count // 10 < answered < count - count // 10


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_prompt_by_itself(run: Run, prompt: str) -> None:
    config = GenerateConfig(model="tiny", prompts=(prompt,), max_new_tokens=3, device="cpu", json=True)
    is_too_long = len(TOKENIZER.encode(prompt)) > 16
    assert answer(run, config) == (not is_too_long)


def test_a_prompt_that_is_too_long_is_found_before_the_first_is_continued(run: Run) -> None:
    """However many there are: eight are written at a time."""
    config = GenerateConfig(model="tiny", prompts=("the",) * 9 + ("x" * 99,), max_new_tokens=2, device="cpu")
    written, said = run(config)
    assert "prompt 10 has" in said
    assert written == ""


def test_without_the_check_of_values_it_would_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    wrong = GenerateConfig(model="tiny", max_new_tokens=3, device="cpu", top_k=-1)
    assert not answer(run, wrong)
    monkeypatch.setattr(SamplingConfig, "problems", lambda self: [])
    with pytest.raises(RuntimeError):
        answer(run, wrong)
