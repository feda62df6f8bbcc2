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
from overnight.evaluation.harness import HarnessScore, build_lm, check_harness, harness_scores
from overnight.evaluation.multiple_choice import evaluate_choices
from overnight.evaluation.passages import Passage, evaluate_passages
from overnight.evaluation.scores import TaskResult
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is an optional extra")
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")  # of files that the harness leaves open

CONTEXT = 48
TEXTS = [
    "A man is sitting on a roof. he starts pulling up roofing on the roof.",
    "How to bake bread [title] Mix the flour. [substeps] Use warm water, and wait.",
    "The quick brown fox jumps over the lazy dog; then it sleeps, and the dog does not.",
]
TOKENIZER = build_tokenizer("bpe-360", TEXTS * 20)
DATA = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
validation_split: validation
"""
HELLASWAG = """\
output_type: multiple_choice
process_docs: !function lm_eval.tasks.hellaswag.utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
COMPLETIONS = """\
output_type: generate_until
doc_to_text: "{{activity_label}}"
doc_to_target: "{{ctx}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 5
  num_beams: 4
metric_list:
  - metric: exact_match
"""


def build_model(context_length: int) -> GPT:
    """Small, with weights so large that its predictions are confident."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": TOKENIZER.vocab_size}
    found = GPT(ModelConfig(**sizes, context_length=context_length))
    initialize(found, seed=0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(6)
    return found.eval()


MODEL = build_model(CONTEXT)


@pytest.fixture
def ours() -> Any:
    return build_lm(MODEL, TOKENIZER, "fp32")


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """The harness's own HFLM on the same weights."""
    pytest.importorskip("accelerate", reason="the harness's HFLM needs accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_huggingface(MODEL, TOKENIZER, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    return HFLM(pretrained=exported, tokenizer=tokenizer, device="cpu", batch_size=3, max_length=CONTEXT)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def write_task(folder: Path, name: str, text: str = HELLASWAG, questions: int = 3) -> Path:
    """A folder with a task over `questions` records of HellaSwag, with everything that the harness cleans."""
    draw = random.Random(0)
    words = " ".join(TEXTS).replace(".", "").split()

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    lines = []
    for number in range(questions):
        first, second = f"{some(3, 9)}. [header] {some(2, 5)}  {some(1, 2)}.", some(1, 4).lower()
        endings = [f"{some(1, 6)} [title] {some(1, 4)}. [step] {some(1, 3)}" for _ in range(4)]
        question = {"ind": number, "activity_label": some(1, 3), "ctx_a": first, "ctx_b": second}
        question |= {"ctx": f"{first} {second}", "endings": endings, "label": draw.randrange(4)}
        lines.append(json.dumps(question) + "\n")
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(lines))
    (folder / f"{name}.yaml").write_text(DATA.format(name=name, data=data, cache=folder / "cache") + text)
    return folder


def values(found: Sequence[HarnessScore]) -> dict[str, float]:
    return {score.metric: score.value for score in found}


def test_hellaswag_matches_harness(tmp_path: Path) -> None:
    model = build_model(640)  # the harness cuts long questions differently
    folder = write_task(tmp_path, "invented", questions=40)
    found = harness_scores(model, TOKENIZER, ["invented"], folder=folder)
    task = CHOICE_TASKS["hellaswag-lm-eval"]
    questions = list(read_questions(task, tmp_path / "invented.jsonl"))
    choices = [encode_question(question, TOKENIZER, 640) for question in questions]
    result = TaskResult(choices, [nats for _, nats in sorted(evaluate_choices(model, choices))])
    by_sum, per_character = (
        np.mean(result.correct(f"accuracy_{each}")) for each in ("by_sum", "per_character")
    )
    assert values(found) == {"acc": by_sum, "acc_norm": per_character}
    assert 0.1 < by_sum < 0.5
    assert {(score.task, score.samples) for score in found} == {("invented", 40)}
    for score in found:  # of a sample, not of a population
        assert score.standard_error == pytest.approx((score.value * (1 - score.value) / 39) ** 0.5)
    fewer = harness_scores(model, TOKENIZER, ["invented"], folder=folder, limit=7)
    assert {score.samples for score in fewer} == {7}
    # The negative control: the two lengths differ, and so does build-nanogpt's format.
    assert by_sum != per_character
    plain = read_questions(CHOICE_TASKS["hellaswag"], tmp_path / "invented.jsonl")
    assert all(one.context != other.context for one, other in zip(plain, questions, strict=True))


def test_harness_scores_match_simple_evaluate(ours: Any, tmp_path: Path) -> None:
    """With two examples before each question."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    few = HELLASWAG + "num_fewshot: 2\nfewshot_split: validation\n"
    folder = write_task(tmp_path, "few", few, questions=12)
    found = harness_scores(MODEL, TOKENIZER, ["few"], folder=folder)
    index = TaskManager(include_defaults=False, include_path=str(folder))
    with harness._isolated():
        results = simple_evaluate(model=ours, tasks=["few"], task_manager=index, log_samples=True)
    assert results is not None
    assert values(found) == {name: results["results"]["few"][f"{name},none"] for name in ("acc", "acc_norm")}
    prompt = results["samples"]["few"][0]["arguments"][0][0]
    assert prompt.count(": ") >= 3  # two examples and the question


PAIRS = [
    ("A man is sitting", " on a roof"),
    ("A man is sitting ", "on a roof"),  # the space belongs to the continuation
    ("A man is sitting \n", " on a roof."),
    ("", "The quick brown fox"),
    ("The dog, ", " the fox;" * 4),
    ("and then the lazy dog sleeps " * 12, " and waits for the fox"),  # longer than the context
]


def greedy_pairs() -> list[tuple[str, str]]:
    """Contexts, and the most likely next token."""
    found = []
    for context in ("A man is", "Mix the flour", "the lazy dog; then"):
        ids = TOKENIZER.encode(context)
        token = int(MODEL(torch.tensor([ids]))[0, -1].argmax())
        if TOKENIZER.encode(context + TOKENIZER.decode([token])) == [*ids, token]:
            found.append((context, TOKENIZER.decode([token])))
    return found


def test_likelihoods_match_harness_model(ours: Any, theirs: Any) -> None:
    pairs = requests(*PAIRS, *greedy_pairs())
    found = ours.loglikelihood(pairs)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    assert ours.loglikelihood(requests(("The", ""))) == [(0.0, True)]
    # The negative control: the space stays with the context.
    context, continuation = TOKENIZER.encode("A man is sitting "), TOKENIZER.encode("on a roof")
    ((_, apart),) = evaluate_passages(MODEL, [Passage(context + continuation, len(continuation))])
    assert abs(-apart.nats - expected[1][0]) > 1e-2


def test_rolling_likelihoods_match_harness_model(ours: Any, theirs: Any) -> None:
    texts = [TEXTS[0], "", "The", " ".join(TEXTS * 3), "dog " * (CONTEXT - 1), "dog " * CONTEXT]
    found = ours.loglikelihood_rolling(requests(*((text,) for text in texts)))
    expected = theirs.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert max(len(TOKENIZER.encode(text)) for text in texts) > 2 * CONTEXT
    assert found[1] == 0.0
    assert len(set(found)) == len(found)


def test_completions_match_harness_model(ours: Any, theirs: Any) -> None:
    prompts = ["A man is", "Mix the flour", "The quick brown fox jumps over the lazy dog " * 6, "dog"]
    free: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False}
    written = ours.generate_until(requests(*((prompt, free) for prompt in prompts)))
    assert written == theirs.generate_until(requests(*((p, dict(free)) for p in prompts)), disable_tqdm=True)
    assert all(written)
    # A stop string from the middle of a completion, and two kinds of requests at once.
    stop = written[0][len(written[0]) // 2 :][:3]
    stopped = {"until": [stop, "absent"], "max_gen_toks": 12}
    mixed = [(prompts[0], stopped), (prompts[1], free), (prompts[0], free)]
    found = ours.generate_until(requests(*mixed))
    expected = theirs.generate_until(requests(*((p, dict(w)) for p, w in mixed)), disable_tqdm=True)
    assert found == expected
    assert found[0] == written[0].split(stop)[0] != written[0]


def test_batches_do_not_change_completions(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    prompts = [text[:length] for text in TEXTS for length in (5, 20, 12)]
    whole = ours.generate_until(requests(*((prompt, drawn) for prompt in prompts)))
    greedy = ours.generate_until(requests(*((prompt, {**drawn, "do_sample": False}) for prompt in prompts)))
    monkeypatch.setattr(harness, "TOKENS_AT_ONCE", 30)
    assert ours.generate_until(requests(*((prompt, drawn) for prompt in prompts))) == whole != greedy


def test_too_long_requests_are_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match="continuation .*48"):
        ours.loglikelihood(requests(("The", " dog and fox" * CONTEXT)))
    with pytest.raises(ValueError, match="completion of 48 tokens"):
        ours.generate_until(requests(("The", {"until": [], "max_gen_toks": CONTEXT})))
    assert len(ours.generate_until(requests(("The", {"until": [], "max_gen_toks": CONTEXT - 1})))) == 1


def test_unsupported_generation_setting_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "completed", COMPLETIONS)
    with pytest.raises(ValueError, match="num_beams=4"):
        harness_scores(MODEL, TOKENIZER, ["completed"], folder=folder)
    write_task(tmp_path, "completed", COMPLETIONS.replace("num_beams", "top_k"))
    (score,) = harness_scores(MODEL, TOKENIZER, ["completed"], folder=folder)
    assert (score.metric, score.value, score.samples) == ("exact_match", 0.0, 3)
    request = harness.parse_request({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": "x"})
    sampling = SamplingConfig(temperature=0.5, top_k=None, top_p=0.9)
    assert request == Decoding(max_new_tokens=256, sampling=sampling, stop=("x",))


def test_missing_harness_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(ValueError, match=r"pip install 'overnight\[lm-eval\]'"):
        check_harness(["hellaswag"])


def test_harness_names_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    full_index: list[bool] = []
    real: Callable[..., None] = TaskManager.__init__

    def watched(self: Any, include_defaults: bool = True, **options: Any) -> None:
        full_index.append(include_defaults)
        real(self, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", watched)
    folder = write_task(tmp_path, "my_own_task")
    check_harness(["hellaswag", "lambada_openai"])
    check_harness(["hellaswag", "my_own_task"], folder)
    assert not any(full_index)
    for name, message in (("my_own_tusk", "my_own_tusk.* my_own_task"), ("qqq", "qqq.*lm-eval ls tasks")):
        with pytest.raises(ValueError, match=message):
            check_harness([name], folder)
    assert full_index[-1]
    with pytest.raises(ValueError, match="nowhere"):
        check_harness(["hellaswag"], tmp_path / "nowhere")


def test_unavailable_task_is_reported_in_one_sentence(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "absent")
    (tmp_path / "absent.jsonl").unlink()
    for name in ("absent", "hellaswag"):  # a missing file, and a download without a network
        with pytest.raises(ValueError, match=f"lm-eval's task {name}") as caught:
            harness_scores(MODEL, TOKENIZER, [name], folder=folder)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_harness_leaves_caller_unchanged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, model = write_task(tmp_path, "invented"), build_model(CONTEXT).train()
    states = random.getstate(), np.random.get_state()[1], torch.get_rng_state()

    def are_unchanged() -> bool:
        return (
            random.getstate() == states[0]
            and np.array_equal(np.random.get_state()[1], states[1])
            and torch.equal(torch.get_rng_state(), states[2])
        )

    harness_scores(model, TOKENIZER, ["invented"], folder=folder)
    assert are_unchanged()
    assert model.training
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("likelihoods: 12 rows in ")
    assert err.count("\n") == 1
    with harness._isolated():  # the negative control
        random.random(), np.random.random(), torch.rand(1)
        sys.stdout.write("shown")
        assert not are_unchanged()
    assert are_unchanged()
    assert capfd.readouterr().out == ""
