"""The harness asks our model as it asks Hugging Face's, and our HellaSwag is its HellaSwag."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from overnight.conversion.huggingface import write_huggingface
from overnight.evaluation import harness
from overnight.evaluation.choice_tasks import CHOICE_TASKS, encode_question, read_questions
from overnight.evaluation.harness import (
    EvalHarnessLM,
    GenerationRequest,
    HarnessScore,
    build_lm,
    check_harness,
    harness_scores,
)
from overnight.evaluation.multiple_choice import evaluate_choices
from overnight.generation import SamplingConfig
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval, an optional extra, is not installed")
# What the harness leaves open at its end is its own.
quiet = pytest.mark.filterwarnings("default::ResourceWarning")

CONTEXT = 48
TEXTS = [
    "A man is sitting on a roof. he starts pulling up roofing on the roof.",
    "How to bake bread [title] Mix the flour. [substeps] Use warm water, and wait.",
    "The quick brown fox jumps over the lazy dog; then it sleeps, and the dog does not.",
]
HELLASWAG = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
output_type: multiple_choice
validation_split: validation
process_docs: !function lm_eval.tasks.hellaswag.utils.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
COMPLETIONS = """\
task: completed
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
output_type: generate_until
test_split: test
doc_to_text: "{{{{activity_label}}}}"
doc_to_target: "{{{{ctx}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 5
  {wish}: 4
metric_list:
  - metric: exact_match
"""


def make_model(vocab_size: int, context_length: int) -> GPT:
    """Small, with weights so large that it is sure of something."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=context_length, vocab_size=vocab_size)
    found = GPT(config)
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(6)
    return found.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bpe-360", TEXTS * 20)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return make_model(tokenizer.vocab_size, CONTEXT)


@pytest.fixture(scope="module")
def long(tokenizer: Tokenizer) -> GPT:
    """One that reads every question whole; of what is too long, the harness cuts another part than we do."""
    return make_model(tokenizer.vocab_size, 640)


@pytest.fixture
def theirs(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """The harness's own HFLM on the same weights."""
    pytest.importorskip("accelerate", reason="the harness's HFLM needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_huggingface(model, tokenizer, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    return HFLM(
        pretrained=exported,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"),
        device="cpu",
        batch_size=3,
        max_length=CONTEXT,
    )


def requests(*asked: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in asked]


def write_task(folder: Path, name: str, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    text = HELLASWAG.format(name=name, data=data, cache=folder / "cache")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def made_up(path: Path, count: int = 40) -> Path:
    """A file of HellaSwag's kind, with everything that the harness cleans."""
    chosen = random.Random(0)
    words = " ".join(TEXTS).replace(".", "").split()

    def some(least: int, most: int) -> str:
        return " ".join(chosen.choices(words, k=chosen.randint(least, most)))

    lines = []
    for number in range(count):
        first, second = f"{some(3, 9)}. [header] {some(2, 5)}  {some(1, 2)}.", some(1, 4).lower()
        endings = [f"{some(1, 6)} [title] {some(1, 4)}. [step] {some(1, 3)}" for _ in range(4)]
        question = {"ind": number, "activity_label": some(1, 3), "ctx_a": first, "ctx_b": second}
        question |= {"ctx": f"{first} {second}", "endings": endings, "label": chosen.randrange(4)}
        lines.append(json.dumps(question))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def our_accuracies(model: GPT, tokenizer: Tokenizer, data: Path) -> tuple[float, float]:
    """Per sum and per character, by our own engine of choices."""
    questions = list(read_questions(CHOICE_TASKS["hellaswag-lm-eval"], data))
    judged = [
        each for _, each in evaluate_choices(model, [encode_question(one, tokenizer) for one in questions])
    ]
    assert len(judged) == len(questions)
    return (
        sum(each.by_sum for each in judged) / len(judged),
        sum(each.by_character for each in judged) / len(judged),
    )


def values(found: Sequence[HarnessScore]) -> dict[str, float]:
    return {score.metric: score.value for score in found}


# ---------------------------------------------------------------- HellaSwag, to the digit


@needs_harness
@quiet
def test_hellaswag_is_the_harness_s_to_the_digit(long: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = made_up(tmp_path / "hellaswag_val.jsonl")
    folder = write_task(tmp_path / "tasks", "made_up_hellaswag", data)
    found = harness_scores(long, tokenizer, ["made_up_hellaswag"], folder=folder)
    by_sum, by_character = our_accuracies(long, tokenizer, data)
    assert values(found) == {"acc": by_sum, "acc_norm": by_character}
    assert {(score.task, score.samples) for score in found} == {("made_up_hellaswag", 40)}
    for score in found:  # the harness's: of a sample, not of a population
        assert score.standard_error == pytest.approx((score.value * (1 - score.value) / 39) ** 0.5)
        assert str(score).startswith(
            f"made_up_hellaswag  {score.metric:<20}{score.value:.4f}   standard error 0."
        )
    # It could differ: by the other length, and with the text as build-nanogpt puts it.
    assert by_sum != by_character
    plain = list(read_questions(CHOICE_TASKS["hellaswag"], data))
    cleaned = list(read_questions(CHOICE_TASKS["hellaswag-lm-eval"], data))
    assert all(one.context != other.context for one, other in zip(plain, cleaned, strict=True))


@needs_harness
@quiet
def test_hellaswag_is_the_harness_s_on_real_questions(
    long: GPT, tokenizer: Tokenizer, shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "hellaswag" / "hellaswag_val_first2000.jsonl"
    if not source.is_file():
        pytest.skip("../shared/data has no hellaswag")
    data = tmp_path / "hellaswag_val.jsonl"
    with source.open(encoding="utf-8") as lines, data.open("w", encoding="utf-8") as file:
        for line, _ in zip(lines, range(200), strict=False):
            question = json.loads(line)
            first, dot, second = question["ctx"].rpartition(". ")  # the file has but the two together
            question |= {"ctx_a": first + dot.rstrip(), "ctx_b": second} if dot else {}
            question = {"ctx_a": question["ctx"], "ctx_b": ""} | question
            file.write(json.dumps(question) + "\n")
    folder = write_task(tmp_path / "tasks", "real_hellaswag", data)
    found = harness_scores(long, tokenizer, ["real_hellaswag"], folder=folder)
    by_sum, by_character = our_accuracies(long, tokenizer, data)
    assert values(found) == {"acc": by_sum, "acc_norm": by_character}
    assert 0.1 < by_sum < 0.5
    fewer = harness_scores(long, tokenizer, ["real_hellaswag"], folder=folder, limit=7)
    assert {score.samples for score in fewer} == {7}


@needs_harness
@quiet
def test_what_simple_evaluate_says(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The harness's front door, with examples before each question, against ours."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = write_task(tmp_path / "tasks", "few", made_up(tmp_path / "data.jsonl", 12))
    with (folder / "few.yaml").open("a", encoding="utf-8") as file:
        file.write("num_fewshot: 2\nfewshot_split: validation\n")
    found = harness_scores(model, tokenizer, ["few"], folder=folder)
    lm = build_lm(EvalHarnessLM(model, tokenizer, "fp32"))
    index = TaskManager(include_defaults=False, include_path=str(folder))
    with harness._undisturbed():
        said = simple_evaluate(model=lm, tasks=["few"], task_manager=index, log_samples=True)
    assert said is not None
    assert values(found) == {name: said["results"]["few"][f"{name},none"] for name in ("acc", "acc_norm")}
    prompt = said["samples"]["few"][0]["arguments"][0][0]
    assert prompt.count(": ") >= 3  # two examples and the question


# ---------------------------------------------------------------- beside the harness's own model

PAIRS = [
    ("A man is sitting", " on a roof"),
    ("A man is sitting ", "on a roof"),  # the blank belongs to what follows
    ("A man is sitting \n", " on a roof."),
    ("", "The quick brown fox"),
    ("The", " dog"),
    ("The dog, ", " the fox;" * 4),
    ("and then the lazy dog sleeps " * 12, " and waits for the fox"),  # longer than the context
    ("over the lazy dog", " sleeps"),
    ("over the lazy dog", " jumps over the lazy dog"),
]


def greedy_pairs(model: GPT, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Contexts and the one token that this model writes after them."""
    found = []
    for context in ("A man is", "Mix the flour", "the lazy dog; then"):
        with torch.no_grad():
            token = int(model(torch.tensor([tokenizer.encode(context)]))[0, -1].argmax())
        if tokenizer.encode(context + tokenizer.decode([token])) == [*tokenizer.encode(context), token]:
            found.append((context, tokenizer.decode([token])))
    return found


@needs_harness
@quiet
def test_likelihoods_are_those_of_the_harness_s_own_model(
    model: GPT, tokenizer: Tokenizer, theirs: Any
) -> None:
    pairs = PAIRS + greedy_pairs(model, tokenizer)
    ours = build_lm(EvalHarnessLM(model, tokenizer, "fp32")).loglikelihood(requests(*pairs))
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(ours, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    assert {greedy for _, greedy in ours} == {True, False}
    # It could differ: a blank that stays with the context, and a context cut one token later.
    assert ours[1][0] == pytest.approx(ours[0][0], abs=1e-5)
    apart = EvalHarnessLM(model, tokenizer, "fp32")._judge(
        [harness_passage(tokenizer.encode("A man is sitting "), tokenizer.encode("on a roof"))]
    )
    assert abs(-apart[0].nats - expected[1][0]) > 1e-2


def harness_passage(context: list[int], continuation: list[int]) -> Any:
    from overnight.evaluation.passages import Passage

    return Passage(context + continuation, len(continuation))


@needs_harness
@quiet
def test_whole_texts_are_judged_as_the_harness_s_own_model_does(
    model: GPT, tokenizer: Tokenizer, theirs: Any
) -> None:
    texts = [TEXTS[0], "", "The", " ".join(TEXTS * 3), "dog " * (CONTEXT - 1), "dog " * CONTEXT]
    ours = build_lm(EvalHarnessLM(model, tokenizer, "fp32")).loglikelihood_rolling(
        requests(*((text,) for text in texts))
    )
    expected = theirs.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert ours == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert max(len(tokenizer.encode(text)) for text in texts) > 2 * CONTEXT
    assert ours[1] == 0.0
    assert len(set(ours)) == len(ours)


@needs_harness
@quiet
def test_completions_are_those_of_the_harness_s_own_model(
    model: GPT, tokenizer: Tokenizer, theirs: Any
) -> None:
    prompts = ["A man is", "Mix the flour", "The quick brown fox jumps over the lazy dog " * 6, "dog"]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False}
    lm = build_lm(EvalHarnessLM(model, tokenizer, "fp32"))
    written = lm.generate_until(requests(*((prompt, free) for prompt in prompts)))
    assert written == theirs.generate_until(requests(*((p, dict(free)) for p in prompts)), disable_tqdm=True)
    assert all(written)
    # Stop strings out of the middle of what is written, and two wishes at once.
    stop = written[0][len(written[0]) // 2 :][:3]
    stopped = {"until": [stop, "nowhere"], "max_gen_toks": 12}
    asked = [(prompts[0], stopped), (prompts[1], free), (prompts[0], free)]
    found = lm.generate_until(requests(*asked))
    expected = theirs.generate_until(requests(*((p, dict(w)) for p, w in asked)), disable_tqdm=True)
    assert found == expected
    assert found[0] == written[0].split(stop)[0] != written[0]


# ---------------------------------------------------------------- what is asked for


def test_batches_do_not_change_what_is_written(model: GPT, tokenizer: Tokenizer) -> None:
    answers = EvalHarnessLM(model, tokenizer, "fp32")
    sampling = SamplingConfig(temperature=1.0, top_k=None, seed=3)
    prompts = [
        (text[:length], GenerationRequest(6, (), sampling)) for text in TEXTS for length in (5, 20, 12)
    ]
    whole = answers.completions(prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overnight.evaluation.harness.TOKENS_AT_ONCE", 30)
        assert answers.completions(prompts) == whole
    greedy = [(prompt, GenerationRequest(6, (), SamplingConfig(temperature=0.0))) for prompt, _ in prompts]
    assert answers.completions(greedy) != whole


def test_what_can_not_be_read_at_once_is_refused(model: GPT, tokenizer: Tokenizer) -> None:
    answers = EvalHarnessLM(model, tokenizer, "fp32")
    with pytest.raises(
        ValueError, match=r"a continuation of \d+ tokens does not fit the model's context of 48"
    ):
        answers.likelihoods([("The", " dog and fox" * CONTEXT)])
    with pytest.raises(ValueError, match="a completion of 48 tokens leaves no room for a prompt"):
        answers.completions([("The", GenerationRequest(CONTEXT, (), SamplingConfig(temperature=0.0)))])
    assert (
        len(
            answers.completions(
                [("The", GenerationRequest(CONTEXT - 1, (), SamplingConfig(temperature=0.0)))]
            )
        )
        == 1
    )
    (nothing,) = answers.likelihoods([("The", "")])
    assert nothing == (0.0, True)


@needs_harness
@quiet
def test_a_wish_that_is_not_fulfilled_is_refused(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = made_up(tmp_path / "data.jsonl", 3)
    text = COMPLETIONS.format(data=data, cache=folder / "cache", wish="num_beams")
    (folder / "completed.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="completions with num_beams=4, which is not done here"):
        harness_scores(model, tokenizer, ["completed"], folder=folder)
    (folder / "completed.yaml").write_text(text.replace("num_beams", "top_k"), encoding="utf-8")
    (score,) = harness_scores(model, tokenizer, ["completed"], folder=folder)
    assert (score.metric, score.value, score.samples) == ("exact_match", 0.0, 3)
    wish = harness._wish({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": "x"})
    assert wish == GenerationRequest(256, ("x",), SamplingConfig(temperature=0.5, top_k=None, top_p=0.9))


# ---------------------------------------------------------------- names, networks, and whom it disturbs


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(ValueError, match=r"not installed: pip install 'overnight\[lm-eval\]'"):
        check_harness(["hellaswag"])


@needs_harness
@quiet
def test_names_are_checked_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    from lm_eval.tasks import TaskManager

    asked: list[bool] = []
    real: Callable[..., None] = TaskManager.__init__

    def watched(self: Any, include_defaults: bool = True, **options: Any) -> None:
        asked.append(include_defaults)
        real(self, include_defaults=False, **options)  # ten seconds less

    monkeypatch.setattr(TaskManager, "__init__", watched)
    folder = write_task(tmp_path / "tasks", "my_own_task", tmp_path / "none.jsonl")
    check_harness(["hellaswag", "lambada_openai"])
    check_harness(["hellaswag", "my_own_task"], folder)
    assert not any(asked)  # not all of the harness's tasks were read
    with pytest.raises(ValueError, match="knows no task my_own_tusk; did you mean my_own_task?"):
        check_harness(["my_own_tusk"], folder)
    assert asked[-1]
    with pytest.raises(ValueError, match="knows no task qqq; `lm-eval ls tasks` lists what there is"):
        check_harness(["qqq"], folder)
    with pytest.raises(ValueError, match="there is no folder"):
        check_harness(["hellaswag"], tmp_path / "nowhere")


@needs_harness
@quiet
def test_a_task_that_can_not_be_had_is_one_sentence(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "absent", tmp_path / "none.jsonl")
    for name in ("absent", "hellaswag"):  # a file that is not there, and a download without a network
        with pytest.raises(ValueError, match=f"lm-eval's task {name} can't be made ready") as caught:
            harness_scores(model, tokenizer, [name], folder=folder)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None


@needs_harness
@quiet
def test_the_caller_is_not_disturbed(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_task(tmp_path / "tasks", "made_up", made_up(tmp_path / "data.jsonl", 5))
    model.train()
    states = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    harness_scores(model, tokenizer, ["made_up"], folder=folder)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.training
    model.eval()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("likelihoods: 20 rows in ")  # our own bar, where there is no terminal
    assert err.count("\n") == 1
    with harness._undisturbed():  # the control: these would be
        random.random(), np.random.random(), torch.rand(1)
        sys.stdout.write("shown")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capfd.readouterr().out == ""
