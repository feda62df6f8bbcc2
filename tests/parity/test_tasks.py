"""Tasks on real data against a naive script: Transformers' model and tokenizer, one example at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from overnight.conversion.huggingface import write_huggingface
from overnight.evaluation.scores import TaskResult
from overnight.evaluation.tasks import evaluate_task, open_task
from overnight.evaluation.text_tasks import TEXT_TASKS
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer

CONTEXT = 256


class NaiveModel:
    """The same model in Transformers, one example at a time."""

    def __init__(self, folder: Path) -> None:
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.no_grad()
    def nats(self, context: Sequence[int], ending: Sequence[int]) -> tuple[float, bool]:
        """Of an ending after its context, and whether it is greedy."""
        row = torch.tensor([[*context, *ending]])[:, -(CONTEXT + 1) :]
        logs = self.model(row[:, :-1]).logits[0, -len(ending) :].double().log_softmax(-1)
        targets = torch.tensor(ending)
        chosen = logs.gather(1, targets[:, None]).sum()
        return -chosen.item(), bool((logs.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def ours(shared_data):
    """Random weights, so large that its choices are not near ties, and a BPE of real text."""
    text = (shared_data / "wikitext-2" / "wiki.valid.tokens").read_text()
    tokenizer = build_tokenizer("bpe-1024", [text[:300_000]])
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": CONTEXT}
    model = GPT(ModelConfig(**sizes, vocab_size=tokenizer.vocab_size))
    initialize(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "hf"
    write_huggingface(*ours, folder)
    return NaiveModel(folder)


def evaluate(
    name: str, ours: tuple[GPT, Tokenizer], folder: Path, most: int | None
) -> tuple[TaskResult, dict[str, float]]:
    (model, tokenizer), task = ours, open_task(name, folder, most)
    examples = task.encode(tokenizer, CONTEXT)
    result = TaskResult(examples, [numbers for _, numbers in sorted(evaluate_task(model, examples, "fp32"))])
    return result, {score.metric: score.value for score in task.score([result])}


some_or_all = pytest.mark.parametrize("most", [60, pytest.param(None, marks=pytest.mark.slow)])


@some_or_all
def test_hellaswag_matches_naive(ours, theirs, shared_data, tmp_path, most):
    file = shared_data / "hellaswag" / "hellaswag_val_first2000.jsonl"
    (tmp_path / "hellaswag_val.jsonl").write_bytes(file.read_bytes())
    result, values = evaluate("hellaswag", ours, tmp_path, most)
    right = {"accuracy_by_sum": 0, "accuracy_per_token": 0, "accuracy_per_character": 0}
    with file.open() as lines:
        for line, numbers in zip(map(json.loads, islice(lines, most)), result.numbers, strict=True):
            context = theirs.encode(line["ctx"])
            endings = [theirs.encode(f" {ending}") for ending in line["endings"]]
            nats = [theirs.nats(context, ending)[0] for ending in endings]
            assert numbers == pytest.approx(nats, abs=1e-3, rel=1e-5)
            lengths = {
                "accuracy_by_sum": [1] * 4,
                "accuracy_per_token": list(map(len, endings)),
                "accuracy_per_character": list(map(len, line["endings"])),
            }
            for metric, counts in lengths.items():
                means = [each / count for each, count in zip(nats, counts, strict=True)]
                right[metric] += means.index(min(means)) == int(line["label"])
    assert values == {metric: count / len(result.numbers) for metric, count in right.items()}


@some_or_all
def test_lambada_matches_naive(ours, theirs, shared_data, tmp_path, most):
    file = shared_data / "lambada" / "lambada_test_first500.jsonl"
    (tmp_path / "lambada_test.jsonl").write_bytes(file.read_bytes())
    result, values = evaluate("lambada", ours, tmp_path, most)
    found = []
    with file.open() as lines:
        for line in islice(lines, most):
            context, _, word = json.loads(line)["text"].strip().rpartition(" ")
            found.append(theirs.nats(theirs.encode(context), theirs.encode(f" {word}")))
    assert [bool(greedy) for _, greedy in result.numbers] == [greedy for _, greedy in found]
    assert values["accuracy"] == sum(greedy for _, greedy in found) / len(found)
    mean = sum(nats for nats, _ in found) / len(found)
    assert math.log(values["perplexity_per_word"]) == pytest.approx(mean, abs=1e-4)
    # The negative control: a changed weight.
    before = theirs.nats(theirs.encode(context), theirs.encode(f" {word}"))[0]
    bias = theirs.model.transformer.h[0].mlp.c_fc.bias.detach()
    kept = bias.clone()
    bias += 0.1
    assert abs(theirs.nats(theirs.encode(context), theirs.encode(f" {word}"))[0] - before) > 1e-4
    bias.copy_(kept)


@some_or_all
def test_wikitext_matches_naive(ours, theirs, shared_data, tmp_path, most):
    (tmp_path / "wikitext-2").symlink_to(shared_data / "wikitext-2")
    _, values = evaluate("wikitext-2-validation", ours, tmp_path, most)
    raw = (shared_data / "wikitext-2" / "wiki.valid.tokens").read_text()[: most and 1000 * most]
    task = TEXT_TASKS["wikitext-2-validation"]
    ids = theirs.encode(task.read(tmp_path / task.file, most and 1000 * most).text)
    ids = [theirs.tokenizer.eos_token_id, *ids]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(done + CONTEXT, len(ids))
        nats += theirs.nats(ids[max(0, end - CONTEXT - 1) : done], ids[done:end])[0]
        done = end
    words = len(raw.split()) + raw.count("\n")
    assert values["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert math.log(values["perplexity_per_word"]) == pytest.approx(nats / words, abs=1e-4)
