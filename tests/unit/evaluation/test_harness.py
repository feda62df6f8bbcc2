"""Our model against the harness's own model class for Hugging Face, and our HellaSwag against its own."""

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
from overnight.evaluation.passages import Passage, evaluate_passages
from overnight.evaluation.scores import score_choices
from overnight.generation import SamplingConfig
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


def needs_harness(test: Callable[..., None]) -> Callable[..., None]:
    """Skip without the harness, and ignore the files that it leaves open."""
    skip = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval, an optional extra, is not installed")
    return skip(pytest.mark.filterwarnings("default::ResourceWarning")(test))


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
  {setting}: 4
metric_list:
  - metric: exact_match
"""


def make_model(vocab_size: int, context_length: int) -> GPT:
    """Small, with weights so large that its predictions are confident."""
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
    """A context for whole questions; the harness cuts long ones differently."""
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


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def write_task(folder: Path, name: str, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    text = HELLASWAG.format(name=name, data=data, cache=folder / "cache")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def write_questions(path: Path, count: int = 40) -> Path:
    """A file in HellaSwag's format, with everything that the harness cleans."""
    draw = random.Random(0)
    words = " ".join(TEXTS).replace(".", "").split()

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    lines = []
    for number in range(count):
        first, second = f"{some(3, 9)}. [header] {some(2, 5)}  {some(1, 2)}.", some(1, 4).lower()
        endings = [f"{some(1, 6)} [title] {some(1, 4)}. [step] {some(1, 3)}" for _ in range(4)]
        question = {"ind": number, "activity_label": some(1, 3), "ctx_a": first, "ctx_b": second}
        question |= {"ctx": f"{first} {second}", "endings": endings, "label": draw.randrange(4)}
        lines.append(json.dumps(question))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def our_accuracies(model: GPT, tokenizer: Tokenizer, data: Path) -> tuple[float, float]:
    """By sum and per character, as `overnight evaluate` computes them."""
    task = CHOICE_TASKS["hellaswag-lm-eval"]
    choices = [encode_question(question, tokenizer) for question in read_questions(task, data)]
    nats = dict(evaluate_choices(model, choices))
    per_character, by_sum = score_choices(task, choices, [nats[index] for index in range(len(choices))])
    return by_sum.value, per_character.value


def values(found: Sequence[HarnessScore]) -> dict[str, float]:
    return {score.metric: score.value for score in found}


def write_real_questions(path: Path, source: Path) -> Path:
    """The first 200 questions of HellaSwag; of the contexts, the file has only both parts together."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines()[:200]:
        question = json.loads(line)
        first, dot, second = question["ctx"].rpartition(". ")
        parts = {"ctx_a": first + dot.rstrip(), "ctx_b": second} if dot else {}
        lines.append(json.dumps({"ctx_a": question["ctx"], "ctx_b": "", **question, **parts}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@needs_harness
@pytest.mark.parametrize("kind", ["invented", "real"])
def test_hellaswag_matches_harness(
    kind: str, long: GPT, tokenizer: Tokenizer, shared_data: Path, tmp_path: Path
) -> None:
    source, data = shared_data / "hellaswag/hellaswag_val_first2000.jsonl", tmp_path / "hellaswag_val.jsonl"
    if kind == "invented":
        write_questions(data)
    elif not source.is_file():
        pytest.skip("../shared/data has no hellaswag")
    else:
        write_real_questions(data, source)
    folder = write_task(tmp_path / "tasks", kind, data)
    found = harness_scores(long, tokenizer, [kind], folder=folder)
    by_sum, per_character = our_accuracies(long, tokenizer, data)
    assert values(found) == {"acc": by_sum, "acc_norm": per_character}
    assert 0.1 < by_sum < 0.5
    samples = 40 if kind == "invented" else 200
    assert {(score.task, score.samples) for score in found} == {(kind, samples)}
    for score in found:  # of a sample, not of a population
        wanted = (score.value * (1 - score.value) / (samples - 1)) ** 0.5
        assert score.standard_error == pytest.approx(wanted)
    fewer = harness_scores(long, tokenizer, [kind], folder=folder, limit=7)
    assert {score.samples for score in fewer} == {7}
    # The negative control: the two lengths differ, and so does build-nanogpt's format.
    assert by_sum != per_character
    plain, cleaned = (read_questions(CHOICE_TASKS[name], data) for name in ("hellaswag", "hellaswag-lm-eval"))
    assert all(one.context != other.context for one, other in zip(plain, cleaned, strict=True))


@needs_harness
def test_harness_scores_match_simple_evaluate(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With two examples before each question."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = write_task(tmp_path / "tasks", "few", write_questions(tmp_path / "data.jsonl", 12))
    with (folder / "few.yaml").open("a", encoding="utf-8") as file:
        file.write("num_fewshot: 2\nfewshot_split: validation\n")
    found = harness_scores(model, tokenizer, ["few"], folder=folder)
    lm = build_lm(EvalHarnessLM(model, tokenizer, "fp32"))
    index = TaskManager(include_defaults=False, include_path=str(folder))
    with harness._isolated():
        results = simple_evaluate(model=lm, tasks=["few"], task_manager=index, log_samples=True)
    assert results is not None
    assert values(found) == {name: results["results"]["few"][f"{name},none"] for name in ("acc", "acc_norm")}
    prompt = results["samples"]["few"][0]["arguments"][0][0]
    assert prompt.count(": ") >= 3  # two examples and the question


PAIRS = [
    ("A man is sitting", " on a roof"),
    ("A man is sitting ", "on a roof"),  # the space belongs to the continuation
    ("A man is sitting \n", " on a roof."),
    ("", "The quick brown fox"),
    ("The", " dog"),
    ("The dog, ", " the fox;" * 4),
    ("and then the lazy dog sleeps " * 12, " and waits for the fox"),  # longer than the context
    ("over the lazy dog", " sleeps"),
    ("over the lazy dog", " jumps over the lazy dog"),
]


def greedy_pairs(model: GPT, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Contexts, and the most likely next token."""
    found = []
    for context in ("A man is", "Mix the flour", "the lazy dog; then"):
        with torch.no_grad():
            token = int(model(torch.tensor([tokenizer.encode(context)]))[0, -1].argmax())
        if tokenizer.encode(context + tokenizer.decode([token])) == [*tokenizer.encode(context), token]:
            found.append((context, tokenizer.decode([token])))
    return found


@needs_harness
def test_likelihoods_match_harness_model(model: GPT, tokenizer: Tokenizer, theirs: Any) -> None:
    pairs = PAIRS + greedy_pairs(model, tokenizer)
    ours = build_lm(EvalHarnessLM(model, tokenizer, "fp32")).loglikelihood(requests(*pairs))
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(ours, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    assert {greedy for _, greedy in ours} == {True, False}
    # The negative control: the space stays with the context.
    assert ours[1][0] == pytest.approx(ours[0][0], abs=1e-5)
    context, continuation = tokenizer.encode("A man is sitting "), tokenizer.encode("on a roof")
    ((_, apart),) = evaluate_passages(model, [Passage(context + continuation, len(continuation))])
    assert abs(-apart.nats - expected[1][0]) > 1e-2


@needs_harness
def test_rolling_likelihoods_match_harness_model(model: GPT, tokenizer: Tokenizer, theirs: Any) -> None:
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
def test_completions_match_harness_model(model: GPT, tokenizer: Tokenizer, theirs: Any) -> None:
    prompts = ["A man is", "Mix the flour", "The quick brown fox jumps over the lazy dog " * 6, "dog"]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False}
    lm = build_lm(EvalHarnessLM(model, tokenizer, "fp32"))
    written = lm.generate_until(requests(*((prompt, free) for prompt in prompts)))
    assert written == theirs.generate_until(requests(*((p, dict(free)) for p in prompts)), disable_tqdm=True)
    assert all(written)
    # A stop string from the middle of a completion, and two kinds of requests at once.
    stop = written[0][len(written[0]) // 2 :][:3]
    stopped = {"until": [stop, "absent"], "max_gen_toks": 12}
    mixed = [(prompts[0], stopped), (prompts[1], free), (prompts[0], free)]
    found = lm.generate_until(requests(*mixed))
    expected = theirs.generate_until(requests(*((p, dict(w)) for p, w in mixed)), disable_tqdm=True)
    assert found == expected
    assert found[0] == written[0].split(stop)[0] != written[0]


def test_batches_do_not_change_completions(model: GPT, tokenizer: Tokenizer) -> None:
    ours = EvalHarnessLM(model, tokenizer, "fp32")
    sampling = SamplingConfig(temperature=1.0, top_k=None, seed=3)
    prompts = [
        (text[:length], GenerationRequest(6, (), sampling)) for text in TEXTS for length in (5, 20, 12)
    ]
    whole = ours.completions(prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overnight.evaluation.harness.TOKENS_AT_ONCE", 30)
        assert ours.completions(prompts) == whole
    greedy = [(prompt, GenerationRequest(6, (), SamplingConfig(temperature=0.0))) for prompt, _ in prompts]
    assert ours.completions(greedy) != whole


def test_too_long_requests_are_refused(model: GPT, tokenizer: Tokenizer) -> None:
    ours = EvalHarnessLM(model, tokenizer, "fp32")
    greedy = SamplingConfig(temperature=0.0)
    with pytest.raises(ValueError, match="continuation .*48"):
        ours.likelihoods([("The", " dog and fox" * CONTEXT)])
    with pytest.raises(ValueError, match="completion of 48 tokens"):
        ours.completions([("The", GenerationRequest(CONTEXT, (), greedy))])
    assert len(ours.completions([("The", GenerationRequest(CONTEXT - 1, (), greedy))])) == 1
    (nothing,) = ours.likelihoods([("The", "")])
    assert nothing == (0.0, True)


@needs_harness
def test_unsupported_generation_setting_is_refused(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = write_questions(tmp_path / "data.jsonl", 3)
    text = COMPLETIONS.format(data=data, cache=folder / "cache", setting="num_beams")
    (folder / "completed.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="num_beams=4"):
        harness_scores(model, tokenizer, ["completed"], folder=folder)
    (folder / "completed.yaml").write_text(text.replace("num_beams", "top_k"), encoding="utf-8")
    (score,) = harness_scores(model, tokenizer, ["completed"], folder=folder)
    assert (score.metric, score.value, score.samples) == ("exact_match", 0.0, 3)
    request = harness.parse_request({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": "x"})
    assert request == GenerationRequest(256, ("x",), SamplingConfig(temperature=0.5, top_k=None, top_p=0.9))


def test_missing_harness_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(ValueError, match=r"pip install 'overnight\[lm-eval\]'"):
        check_harness(["hellaswag"])


@needs_harness
def test_harness_names_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: GPT, tokenizer: Tokenizer
) -> None:
    from lm_eval.tasks import TaskManager

    full_index: list[bool] = []
    real: Callable[..., None] = TaskManager.__init__

    def watched(self: Any, include_defaults: bool = True, **options: Any) -> None:
        full_index.append(include_defaults)
        real(self, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", watched)
    folder = write_task(tmp_path / "tasks", "my_own_task", tmp_path / "none.jsonl")
    check_harness(["hellaswag", "lambada_openai"])
    check_harness(["hellaswag", "my_own_task"], folder)
    assert not any(full_index)
    with pytest.raises(ValueError, match=r"my_own_tusk; did you mean my_own_task\?"):
        check_harness(["my_own_tusk"], folder)
    assert full_index[-1]
    with pytest.raises(ValueError, match="qqq; `lm-eval ls tasks`"):
        check_harness(["qqq"], folder)
    with pytest.raises(ValueError, match="nowhere"):
        check_harness(["hellaswag"], tmp_path / "nowhere")


@needs_harness
def test_unavailable_task_is_reported_in_one_sentence(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "tasks", "absent", tmp_path / "none.jsonl")
    for name in ("absent", "hellaswag"):  # a missing file, and a download without a network
        with pytest.raises(ValueError, match=f"lm-eval's task {name}") as caught:
            harness_scores(model, tokenizer, [name], folder=folder)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None


@needs_harness
def test_harness_leaves_caller_unchanged(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_task(tmp_path / "tasks", "invented", write_questions(tmp_path / "data.jsonl", 5))
    model.train()
    states = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    harness_scores(model, tokenizer, ["invented"], folder=folder)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert model.training
    model.eval()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("likelihoods: 20 rows in ")
    assert err.count("\n") == 1
    with harness._isolated():  # the negative control
        random.random(), np.random.random(), torch.rand(1)
        sys.stdout.write("shown")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capfd.readouterr().out == ""
