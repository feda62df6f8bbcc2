"""How fast GPT-2 124M answers HellaSwag: overnight beside build-nanogpt, on the same questions.

    python benchmarks/hellaswag.py --peer ../build-nanogpt --questions val.jsonl --count 100

Random weights, the same on all sides. build-nanogpt has two ways: its program hellaswag.py, whose loop is run
as it is with Transformers' model, and what train_gpt2.py does every 250 steps, with its own. Both compute all
logits of four padded rows, one question at a time. All begin with the questions as text, and the answers,
those that are likeliest per token, must be the same.

On a GPU, all 10,042 questions, from a file that may hold fewer:

    python benchmarks/hellaswag.py --questions val.jsonl --count 10042 --device cuda --precision bf16
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import measure
from checkouts import Program, load_definitions
from overnight.bench.worker import SEED
from overnight.model.model_config import ModelConfig
from overnight.training.compute import autocast
from peers import build_peer, choose_precision
from text import load_bpe

if TYPE_CHECKING:
    from overnight.evaluation.choice_tasks import Question
    from overnight.model.gpt import GPT
    from overnight.tokenizer.tokenizer import Tokenizer

OURS, PROGRAM, TRAINING = "overnight", "build-nanogpt, hellaswag.py", "build-nanogpt, train_gpt2.py"
HEADINGS = ("side", "median s", "min", "max", "questions/s", "overnight is")
SCRIPT = Program(peer="build-nanogpt", file="hellaswag.py", needed=())
FUNCTIONS = ("render_example", "evaluate")
TOLD = re.compile(r"^(\d+) acc_norm: (\d+)/")

Examples = Sequence[dict[str, Any]]
Side = Callable[[], list[int]]
"""Answers all questions; the number of each answer, or 1 and 0 for right and wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is answered, and how."""

    examples: Examples
    questions: Sequence[Question]
    """The same, read."""
    tokenizer: Tokenizer
    precision: str
    device: str


def read_examples(path: Path, count: int) -> Examples:
    """The first `count` lines of a HellaSwag file, from the beginning again if it has fewer."""
    import json

    if not path.is_file():
        raise ValueError(f"there is no file {path}: name HellaSwag's validation file with --questions")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} holds no question")
    return [json.loads(line) for line in itertools.islice(itertools.cycle(lines), count)]


def answer_as_ours(model: GPT, asked: Asked) -> list[int]:
    """What `overnight evaluate --tasks hellaswag` does."""
    import torch

    from overnight.evaluation.choice_tasks import encode_question
    from overnight.evaluation.multiple_choice import evaluate_choices

    torch.set_float32_matmul_precision("highest")  # the program allows a GPU less
    context_length = model.config.context_length
    choices = [encode_question(question, asked.tokenizer, context_length) for question in asked.questions]
    found = dict(evaluate_choices(model, choices, asked.precision))
    return [choice.predict(found[place], "accuracy_per_token") for place, choice in enumerate(choices)]


def answer_as_program(program: ModuleType, model: Any, asked: Asked) -> list[int]:
    """The loop of hellaswag.py, which tells after each question how many were right: 1 if it was, else 0."""
    told: list[str] = []
    vars(program)["iterate_examples"] = lambda _split: iter(asked.examples)
    vars(program)["GPT2LMHeadModel"] = SimpleNamespace(from_pretrained=lambda _name: model)
    vars(program)["print"] = told.append
    with autocast(asked.device, asked.precision):
        program.evaluate("gpt2", asked.device)
    right = [0, *(int(match[2]) for line in told if (match := TOLD.match(line)))]
    return [after - before for before, after in itertools.pairwise(right)]


def answer_as_training(training: ModuleType, program: ModuleType, model: Any, asked: Asked) -> list[int]:
    """The loop inside train_gpt2.py, with its functions."""
    import torch

    found = []
    model.eval()
    for example in asked.examples:
        _, tokens, mask, _ = program.render_example(example)
        tokens, mask = tokens.to(asked.device), mask.to(asked.device)
        with torch.no_grad():
            with autocast(asked.device, asked.precision):
                logits, _ = model(tokens)
            found.append(training.get_most_likely_row(tokens, mask, logits))
    return found


def load_program(checkout: Path, tokenizer: Tokenizer) -> ModuleType:
    """The definitions of hellaswag.py. Raises ValueError if they are not what they were."""
    program = load_definitions(SCRIPT, checkout)
    missing = [name for name in FUNCTIONS if not hasattr(program, name)]
    if missing:
        raise ValueError(f"{checkout / SCRIPT.file} does not define {' and '.join(missing)}")
    vars(program)["enc"] = tokenizer
    return program


def build_sides(model: GPT, asked: Asked, checkout: Path | None) -> dict[str, Side]:
    """Every side that is there."""
    sides: dict[str, Side] = {OURS: partial(answer_as_ours, model, asked)}
    if checkout is not None:
        program = load_program(checkout, asked.tokenizer)
        theirs = build_peer("transformers", None, model).model.to(asked.device).eval()
        sides[PROGRAM] = partial(answer_as_program, program, theirs, asked)
        own = build_peer("build-nanogpt", checkout, model).model.to(asked.device)
        training = sys.modules[type(own).__module__]
        sides[TRAINING] = partial(answer_as_training, training, program, own, asked)
    return sides


def compare(answers: Mapping[str, Sequence[int]], right: Sequence[int]) -> list[str]:
    """Whether the sides answered the same."""
    ours = answers[OURS]
    notes = []
    for name, theirs in answers.items():
        if name == OURS:
            continue
        # The program says which answers are right, not which they are.
        known = ours if name == TRAINING else [int(a == b) for a, b in zip(ours, right, strict=True)]
        same = sum(a == b for a, b in zip(known, theirs, strict=True))
        what = "the same answer" if name == TRAINING else "right, or wrong, on both sides"
        verdict = "" if same == len(ours) else ": THE SIDES DIFFER"
        notes.append(f"{name}: {same:,} of {len(ours):,} questions {what}{verdict}.")
    return notes


def report(options: argparse.Namespace) -> measure.Report:
    """Evaluate with all programs in turn. Raises ValueError, before any work, for invalid options."""
    import torch

    from overnight.evaluation.choice_tasks import CHOICE_TASKS
    from overnight.model.gpt import GPT

    config, precision = check(options)
    examples = read_examples(options.questions, options.count)
    asked = Asked(
        examples=examples,
        questions=[CHOICE_TASKS["hellaswag"].read(example) for example in examples],
        tokenizer=load_bpe(options.bpe),
        precision=precision,
        device=options.device,
    )
    sides = build_sides(GPT(config, seed=SEED).to(options.device), asked, options.peer)
    answers: dict[str, list[int]] = {}

    def answered(name: str) -> float:
        def work() -> None:
            answers[name] = sides[name]()

        return measure.milliseconds(work) / 1e3

    timed = {name: partial(answered, name) for name in sides}
    times = measure.interleave(timed, options.repeats, warm_ups=options.warm_ups)
    rows = [
        [
            name,
            *measure.spread(each, 2),
            f"{len(examples) / statistics.median(each):,.1f}",
            measure.times_as_fast(times[OURS], each),
        ]
        for name, each in times.items()
    ]
    settings = {name: getattr(options, name) for name in ("count", "layers", "repeats", "warm_ups")}
    where = f"{measure.on_device(options.device)}, {precision}"
    return measure.Report(
        title=f"{measure.model_name(config)} answers HellaSwag on {where}",
        headings=HEADINGS,
        rows=rows,
        measured=times,
        settings={**settings, "threads": torch.get_num_threads()},
        notes=[measure.OVERNIGHT_IS, *compare(answers, [int(each["label"]) for each in examples])],
        machine=measure.describe_machine(options.device),
    )


def check(options: argparse.Namespace) -> tuple[ModelConfig, str]:
    """The model and its precision. Raises ValueError for what can't be measured."""
    measure.check_counts(options, "count", "repeats")
    config = measure.gpt2_124m(n_layer=options.layers, vocab_size=50257)
    return config, choose_precision(options.device, options.precision)


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "peer device layers bpe", repeats=3)
    parser.add_argument("--questions", type=Path, required=True, help="hellaswag_val.jsonl")
    parser.add_argument("--count", type=int, default=100, help="questions; a file that has fewer is repeated")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds before them")
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
