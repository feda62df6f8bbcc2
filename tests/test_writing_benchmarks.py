"""The programs that measure how fast a model writes, and what fewer bits cost it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overnight.conversion.huggingface import write_huggingface
from overnight.generation.quantize import generation_precisions
from overnight.model.gpt import GPT, initialize
from overnight.model.model_config import ModelConfig
from overnight.tokenizer.open_tokenizer import build_tokenizer

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=16, vocab_size=50)
PROMPTS = [[1, 2, 3], [4, 5, 6]]


def build_model(config: ModelConfig = TINY) -> GPT:
    model = GPT(config)
    initialize(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("precision", generation_precisions("cpu"))
def test_every_precision_writes_what_is_asked(benchmarks: dict[str, Any], precision: str) -> None:
    generate = benchmarks["generate"]
    model = build_model()
    prepared = generate.prepare_ours(model, precision)
    assert prepared is not model
    setting = generate.Setting(rows=2, new=5, top_k=3)
    milliseconds, completions = generate.write(
        lambda *asked: generate.write_ours(prepared, *asked), PROMPTS, setting
    )
    assert milliseconds > 0
    assert [len(ids) for ids in completions] == [5, 5]
    with pytest.raises(AssertionError):
        generate.write(lambda *_: [[1], [2]], PROMPTS, setting)


def test_best_stands_beside_best_and_int8_beside_int8(benchmarks: dict[str, Any]) -> None:
    generate = benchmarks["generate"]
    times = {
        "overnight, fp32": [40.0, 44.0],
        "overnight, int8": [10.0, 11.0],
        "ctranslate2, int8": [20.0, 11.0],
        "transformers, fp32": [30.0, 33.0],
        "transformers, bf16": [35.0, 34.0],
    }
    setting = generate.Setting(rows=2, new=3, top_k=None)
    same = {"overnight, fp32": [[1, 2, 3], [4, 5, 6]], "transformers, fp32": [[1, 2, 3], [4, 5, 7]]}
    assert generate.notes_on(setting, times, same) == [
        "batch 2, greedy: overnight, int8 is 3.00 times as fast as transformers, fp32.",
        "batch 2, greedy: overnight, int8 is 1.50 times as fast as ctranslate2, int8.",
        "batch 2, greedy: 1 of 2 completions in fp32 are the same ids.",
    ]
    ratios = [row[-1] for row in generate.table_rows(setting, times)]
    assert ratios == ["0.75", "3.00", "2.25", "1.00", "0.91"]
    alone = {"overnight, fp32": [40.0]}
    assert generate.notes_on(setting, alone, {}) == []
    assert [row[-1] for row in generate.table_rows(setting, alone)] == [""]


def test_what_rounding_costs_is_counted_id_by_id(benchmarks: dict[str, Any]) -> None:
    model, another = build_model(), build_model()
    initialize(another, seed=1)
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    found = benchmarks["rounding"].judge({"fp32": model, "again": model, "another": another}, ids)
    nats, others, moved = found["fp32"]
    assert nats.shape == (3 * 16,)
    with torch.no_grad():
        logits = model(ids[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(nats.mean()) == pytest.approx(float(wanted), abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found["again"], found["fp32"], strict=True))
    assert float(others.sum()) == float(moved.sum()) == 0
    assert not torch.allclose(found["another"][0], nats)
    assert all(float(part.mean()) > 0.01 for part in found["another"][1:])


def test_a_trained_model_is_judged_in_every_precision(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    rounding = benchmarks["rounding"]
    tokenizer = build_tokenizer("characters", ["the quick brown fox"])
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=tokenizer.vocab_size)
    write_huggingface(build_model(config), tokenizer, tmp_path / "model")
    (tmp_path / "text").write_text("the quick brown fox " * 5)
    options = rounding.read_options([str(tmp_path / "model"), "--text", str(tmp_path / "text")])
    report = rounding.measure(options)
    assert {row[0] for row in report.rows} == set(generation_precisions("cpu"))
    assert report.rows[0][2] == "+0.00000"
    with pytest.raises(ValueError, match="there is no file nowhere"):
        rounding.measure(rounding.read_options(["model", "--text", "nowhere"]))
    (tmp_path / "text").write_text("the quick")
    with pytest.raises(ValueError, match="give more than the context's 16"):
        rounding.measure(options)
