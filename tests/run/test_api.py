from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import overnight
from overnight.recipe import Recipe

SETTINGS = {"total_steps": 4, "tokens_per_step": 2048, "micro_batch_size": 32, "evaluate_every_steps": 2}


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run of 4 steps in runs/small of the current folder. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        yield overnight.train(recipe(), **SETTINGS)


def test_run_has_metrics_report_and_model(run):
    rows = run.metrics if isinstance(run.metrics, list) else run.metrics.to_dict("records")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len(run.evaluations) == 3
    assert run.report().read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "runs/small" in repr(run)
    assert "parameters" in repr(run.model)


def test_generate_is_what_stream_yields_and_depends_on_the_seed(run):
    model, how = run.model, {"max_new_tokens": 20, "temperature": 1.0}
    text = model.generate("Line 1", **how, seed=1)
    assert text == "".join(model.stream("Line 1", **how, seed=1))
    assert text != model.generate("Line 1", **how, seed=2)


def test_logits_are_those_of_the_module(run):
    model = run.model
    ids = torch.tensor([model.tokenizer.encode("Line 1")])
    expected = model.gpt(ids)
    assert torch.equal(model.logits("Line 1"), expected[0])
    assert torch.equal(model.logits(ids), expected)
    assert not model.logits(ids).requires_grad


def test_evaluate_gives_the_loss_of_the_last_evaluation(run):
    recorded = run.directory.read_events("evaluations")[-1]["loss"]
    assert run.model.evaluate().to_dict()["loss"] == pytest.approx(recorded, rel=1e-5)


def test_prepared_text_is_trained_on(here):
    (here / "notes").mkdir()
    for number in range(30):
        (here / "notes" / f"{number}.txt").write_text(f"Note {number} is about {number * 7}.\n" * 9)
    data = overnight.prepare("notes", tokenizer="characters", validation_fraction=0.2)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32, "compile": False}
    run = overnight.train("shakespeare-char-cpu", data=data, warmup_steps=1, **small, **SETTINGS)
    assert run.model.gpt.config.n_layer == 1


def test_train_works_in_a_thread_twice_and_inside_an_event_loop(recipe, here):
    """Signal handlers belong to the main thread only."""
    losses = []

    def train(name):
        run = overnight.train(recipe(run_name=name), **SETTINGS)
        losses.append(run.directory.read_metrics()[-1]["loss"])

    thread = threading.Thread(target=train, args=("thread",))
    thread.start()
    thread.join()

    async def main():
        train("loop")

    asyncio.run(main())
    train("again")
    assert len(losses) == 3
    assert len({*losses}) == 1


def test_a_run_is_resumed_with_more_steps(run, tmp_path, monkeypatch):
    shutil.copytree("runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/small"):
        overnight.train(Recipe(run_name="small"))
    assert overnight.train(resume="runs/small", total_steps=6).directory.read_metrics()[-1]["step"] == 6
    with pytest.raises(ValueError, match="n_layer"):
        overnight.train(resume="runs/small", n_layer=3)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: overnight.train("quickstart", n_layr=3), "n_layr"),
        (lambda: overnight.train("quikstart"), "quickstart"),
        (lambda: overnight.prepare("nowhere", tokeniser="gpt2"), "tokenizer"),
        (lambda: overnight.load("nowhere"), "nowhere"),
    ],
)
def test_wrong_input_is_a_value_error(here, call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_gpt_is_a_plain_initialised_module():
    gpt = overnight.GPT(
        overnight.ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=300)
    )
    logits = gpt(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, 300)
    assert logits.std() > 0
    with pytest.raises(ValueError, match="vocab_size"):
        overnight.GPT(overnight.ModelConfig())


def test_importing_the_package_does_not_import_torch():
    script = "import sys, overnight; dir(overnight); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    with pytest.raises(AttributeError):
        overnight.nothing  # noqa: B018


def test_every_block_of_the_document_runs(here, repository, capsys):
    text = (repository / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for block in blocks:
        exec(block, names)
    assert "data/my-notes-bpe-512" in capsys.readouterr().out
