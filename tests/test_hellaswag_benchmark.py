"""What could make the HellaSwag benchmark lie: other questions, other answers, not the loop of the peer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.evaluation.choice_tasks import CHOICE_TASKS
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

WORDS = [
    "a",
    "man",
    "sits",
    "on",
    "the",
    "roof",
    "and",
    "pulls",
    "it",
    "off",
    "while",
    "she",
    "bakes",
    "bread",
]
# A program with the two functions, as one might write it. It downloads nothing and needs no Transformers.
PROGRAM = """
import torch

raise SystemExit("no statement of it is run")

def iterate_examples(split):
    raise OSError("it would download")

def render_example(example):
    context = enc.encode(example["ctx"])
    endings = [enc.encode(" " + ending) for ending in example["endings"]]
    length = len(context) + max(map(len, endings))
    tokens, mask = torch.zeros(4, length, dtype=torch.long), torch.zeros(4, length, dtype=torch.long)
    for row, ending in enumerate(endings):
        tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
        mask[row, len(context) : len(context) + len(ending)] = 1
    return None, tokens, mask, example["label"]

@torch.no_grad()
def evaluate(model_type, device):
    model = GPT2LMHeadModel.from_pretrained(model_type)
    right = 0
    for number, example in enumerate(iterate_examples("val"), start=1):
        _, tokens, mask, label = render_example(example)
        likelihoods = torch.log_softmax(model(tokens), -1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        means = (likelihoods * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        right += int(means.argmax().item() == label)
        print(f"{number} acc_norm: {right}/{number}={right / number:.4f}")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> str:
        return " ".join(WORDS[n] for n in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    lines = [
        json.dumps({"ctx": some(5 + n), "endings": [some(2 + (n + i) % 4) for i in range(4)], "label": n % 4})
        for n in range(12)
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "val.jsonl"


@pytest.fixture
def asked(benchmarks: dict[str, Any], file: Path) -> Any:
    examples = benchmarks["hellaswag"].read_examples(file, 12)
    return benchmarks["hellaswag"].Asked(
        examples=examples,
        questions=[CHOICE_TASKS["hellaswag"].read(example) for example in examples],
        tokenizer=build_tokenizer("characters", [" ".join(WORDS)]),
        precision="fp32",
        device="cpu",
    )


def build_model(vocab_size: int, seed: int = 0) -> GPT:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=256, vocab_size=vocab_size))
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    return model.eval()


def test_the_program_s_loop_is_run_on_our_questions(
    benchmarks: dict[str, Any], asked: Any, tmp_path: Path
) -> None:
    hellaswag = benchmarks["hellaswag"]
    (tmp_path / "hellaswag.py").write_text(PROGRAM, encoding="utf-8")
    program = hellaswag.load_program(tmp_path, asked.tokenizer)
    model = build_model(asked.tokenizer.vocab_size)
    ours = hellaswag.answer_as_ours(model, asked)
    assert len(ours) == 12
    assert len(set(ours)) > 1
    theirs = hellaswag.answer_as_program(program, model, asked)
    labels = [example["label"] for example in asked.examples]
    assert theirs == [int(answer == label) for answer, label in zip(ours, labels, strict=True)]
    assert 0 < sum(theirs) < 12
    # Another model answers otherwise, and that is seen.
    another = hellaswag.answer_as_program(program, build_model(asked.tokenizer.vocab_size, seed=1), asked)
    answers = {hellaswag.OURS: ours, hellaswag.PROGRAM: theirs}
    assert hellaswag.compare(answers, labels) == [
        "build-nanogpt, hellaswag.py: 12 of 12 questions right, or wrong, on both sides."
    ]
    (note,) = hellaswag.compare(answers | {hellaswag.PROGRAM: another}, labels)
    assert note.endswith(": THE SIDES DIFFER.")


def test_answers_are_compared_one_by_one(benchmarks: dict[str, Any]) -> None:
    hellaswag = benchmarks["hellaswag"]
    answers = {hellaswag.OURS: [0, 1, 2], hellaswag.TRAINING: [0, 1, 3]}
    assert hellaswag.compare(answers, [3, 1, 0]) == [
        "build-nanogpt, train_gpt2.py: 2 of 3 questions the same answer: THE SIDES DIFFER."
    ]


def test_a_short_file_is_repeated(benchmarks: dict[str, Any], file: Path) -> None:
    read = benchmarks["hellaswag"].read_examples
    assert [example["label"] for example in read(file, 3)] == [0, 1, 2]
    assert read(file, 30)[24:] == read(file, 6)


def test_what_can_t_be_measured_is_refused(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    hellaswag = benchmarks["hellaswag"]
    with pytest.raises(ValueError, match="name HellaSwag's validation file with --questions"):
        hellaswag.read_examples(tmp_path / "val.jsonl", 3)
    (tmp_path / "val.jsonl").touch()
    with pytest.raises(ValueError, match="holds no question"):
        hellaswag.read_examples(tmp_path / "val.jsonl", 3)
    with pytest.raises(ValueError, match="is not a checkout of build-nanogpt"):
        hellaswag.load_program(tmp_path, None)
    (tmp_path / "hellaswag.py").write_text("def evaluate(): ...", encoding="utf-8")
    with pytest.raises(ValueError, match="does not define render_example"):
        hellaswag.load_program(tmp_path, None)
    options: argparse.Namespace = hellaswag.read_options(["--questions", "val.jsonl", "--count", "0"])
    with pytest.raises(ValueError, match="--count 0 is too few"):
        hellaswag.check(options)
