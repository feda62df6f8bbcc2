"""Models by name, and the commands generate and convert on them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from overnight.conversion import ConvertConfig, huggingface
from overnight.conversion import command as conversion_command
from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import OpenedModel, hub_repository, open_model
from overnight.generation import GenerateConfig
from overnight.generation import command as generation_command
from overnight.generation.quantize import generation_precisions
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import build_tokenizer
from overnight.training import OptimizerConfig
from overnight.training.checkpoint.save import save_checkpoint
from overnight.training.optim import build_optimizer
from overnight.training.state import TrainState

TOKENIZER = build_tokenizer("characters", ["the quick brown fox"])


def build_model(seed: int) -> GPT:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "context_length": 16}
    return GPT(ModelConfig(**sizes, vocab_size=TOKENIZER.vocab_size), seed=seed).eval()


@pytest.fixture
def trained(here: Path) -> Path:
    """runs/first, with the checkpoints of steps 1 and 2, whose seeds are the steps."""
    directory = RunDirectory(Path("runs/first"))
    directory.begin("", {})
    TOKENIZER.save(directory.tokenizer)
    for step in (1, 2):
        model = build_model(seed=step)
        save_checkpoint(
            TrainState(model, build_optimizer(model, OptimizerConfig()), step), directory.checkpoints
        )
    return directory.path


def is_model_of(seed: int, model: GPT) -> bool:
    wanted = build_model(seed).weights()
    return all(torch.equal(weight, wanted[name]) for name, weight in model.weights().items())


def places(opened: OpenedModel) -> tuple[Path | None, Path, Path]:
    """What is said about the origin of a model, which is ready to be used with the tokenizer of the tests."""
    assert not opened.model.training
    assert opened.tokenizer.fingerprint == TOKENIZER.fingerprint
    return opened.run, opened.origin, opened.tokenizer_folder


@pytest.mark.parametrize("content", ["[]", "{", '{"tokenizer_fingerprint": "another"}'])
def test_run_with_other_data_or_tokenizer_is_refused(trained: Path, content: str) -> None:
    (trained / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json|trained with"):
        open_model(str(trained))
    (trained / "data.json").write_text(json.dumps({"tokenizer_fingerprint": TOKENIZER.fingerprint}))
    open_model(str(trained))


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_written_files_follow_the_umask(here: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_huggingface(build_model(1), TOKENIZER, here / "hf")
        model = build_model(1)
        save_checkpoint(TrainState(model, build_optimizer(model, OptimizerConfig()), 1), here / "run")
    finally:
        os.umask(before)
    files = [path for path in here.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert {(here / name).stat().st_mode & 0o777 for name in ("hf", "run")} == {0o777 & ~umask}


@pytest.mark.parametrize("broken", ["save_file", "fsync"])
def test_full_disk_is_said_with_the_path(here: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Neither safetensors' error nor that of fsync names a file."""

    def fail(*_: object, **__: object) -> None:
        if broken == "save_file":
            raise SafetensorError("No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_huggingface(build_model(1), TOKENIZER, here / "hf")
    place = (huggingface, "save_file") if broken == "save_file" else (os, "fsync")
    monkeypatch.setattr(*place, fail)
    with pytest.raises(OSError, match=r"hf\b.*No space left|No space left.*hf\b"):
        write_huggingface(build_model(1), TOKENIZER, here / "other-hf")
    assert not (here / "other-hf").exists()


def test_weights_that_are_not_finite_are_refused_by_every_command(here: Path) -> None:
    model = build_model(1)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[3] = torch.nan
    write_huggingface(model, TOKENIZER, here / "nan")
    with pytest.raises(FloatingPointError, match=r"h\.0\.mlp\.c_fc\.bias"):
        open_model("nan")


@pytest.mark.parametrize(
    ("name", "step"), [("runs/first", 2), ("first", 2), ("runs/first/checkpoints/step-00000001", 1)]
)
def test_open_run_or_checkpoint(trained: Path, name: str, step: int) -> None:
    opened = open_model(name)
    assert is_model_of(step, opened.model)
    assert places(opened) == (trained, trained / f"checkpoints/step-0000000{step}", trained / "tokenizer")


def test_open_huggingface_folder(here: Path) -> None:
    with pytest.raises(ValueError, match=r"OWNER/NAME\)$"):
        open_model("theirs")  # nothing is near, where there are no runs
    write_huggingface(build_model(5), TOKENIZER, here / "theirs")
    (here / "theirs" / "metrics.jsonl").write_text("{}\n")
    opened = open_model("theirs")
    assert is_model_of(5, opened.model)
    assert places(opened) == (None, Path("theirs"), Path("theirs"))


@pytest.mark.parametrize(
    ("name", "repository"), [("gpt2-xl", "openai-community/gpt2-xl"), ("a/b.c-d_e", "a/b.c-d_e")]
)
def test_open_hub_name(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str) -> None:
    write_huggingface(build_model(6), TOKENIZER, here / "cache")

    def snapshot_download(asked: str, *, allow_patterns: list[str]) -> str:
        assert asked == repository
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(here / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert is_model_of(6, open_model(name).model)


def test_open_hub_name_offline_or_without_extra(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    with pytest.raises(ValueError, match=r"config\.json.*openai-community/gpt2-medium") as raised:
        open_model("gpt2-medium")
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[hub\]'"):
        open_model("gpt2")


@pytest.mark.parametrize("name", ["", "math", "a/b/c", "../x", "/x", "a/", "a/../b", "https://x/y", "a b/c"])
def test_other_names_are_not_asked_of_the_hub(name: str) -> None:
    assert hub_repository(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frist", r"frist.* first\?"),
        ("runs/frist", r"runs/first\?"),  # not asked of the Hub, since runs/ is a folder here
        ("", "no model"),
        ("runs/first/checkpoints", r"checkpoints .*recipe\.toml"),
    ],
)
def test_open_unknown_name(trained: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_model(name)


def test_open_damaged_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "checkpoints/step-00000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert is_model_of(1, open_model("first").model)
    assert "step-00000002" in capsys.readouterr().err
    shutil.move(trained / "checkpoints/step-00000001", "alone")
    with pytest.raises(ValueError, match="alone .*tokenizer"):
        open_model("alone")
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(ValueError, match="runs/first .*checkpoint"):
        open_model("first")


def test_open_and_convert_nanogpt_checkpoint(here: Path) -> None:
    model = build_model(7)
    state = {f"transformer.{name}": weight for name, weight in model.weights().items()}
    torch.save({"model": state, "model_args": {"n_head": 2, "block_size": 16}}, here / "ckpt.pt")
    opened = open_model("ckpt.pt")
    assert is_model_of(7, opened.model)
    assert places(opened) == (None, Path("ckpt.pt"), Path("gpt2"))
    assert conversion_command.run(ConvertConfig(model="ckpt.pt")) == Path("ckpt-hf")
    assert is_model_of(7, open_model("ckpt-hf").model)
    (here / "no-model").write_text("hello")
    with pytest.raises(ValueError, match="no-model"):
        open_model("no-model")


def test_generate_streams_after_prompt(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in (*generation_precisions("cpu"), None):
        settings = {"prompts": ("the quick\udcff",), "precision": precision, "device": "cpu"}
        generation_command.run(GenerateConfig(model="first", **settings))
        first = capsys.readouterr()
        assert first.out.startswith("the quick?")
        assert f"cpu in {precision or generation_precisions('cpu')[0]}" in first.err
        generation_command.run(GenerateConfig(model="first", **settings))
        assert capsys.readouterr().out == first.out
    monkeypatch.setattr(generation_command, "generation_precisions", lambda device: ("fp16", "fp32"))
    with pytest.raises(ValueError, match="precision=bf16 .*fp16 or fp32"):
        generation_command.run(GenerateConfig(model="no-such-model", precision="bf16", device="cpu"))


def test_generate_json_has_one_object_per_completion(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**settings: Any) -> str:
        generation_command.run(GenerateConfig(model="first", **settings, device="cpu"))
        return capsys.readouterr().out

    two = run(prompts=("the", "fox"), samples=6, json=True, max_new_tokens=7)
    lines = [json.loads(line) for line in two.splitlines()]
    assert [line["prompt"] for line in lines] == ["the"] * 6 + ["fox"] * 6
    assert len({line["completion"] for line in lines}) > 6  # each sample has its own noise
    assert all(line["tokens"] == 7 or line["ended_by"] == "end of text" for line in lines)
    assert {line["precision"] for line in lines} == {generation_precisions("cpu")[0]}
    assert run(prompts=("the",), max_new_tokens=7) == "the" + lines[0]["completion"] + "\n"
    stopping = {"samples": 3, "stop": ("e", "o"), "max_new_tokens": 50, "temperature": 2.0}
    texts = [json.loads(line)["completion"] for line in run(**stopping, json=True).splitlines()]
    assert len(texts) == 3
    assert not {"e", "o"} & set("".join(texts))
    assert run(**stopping) == "\n".join(text + "\n" for text in texts)


def test_convert_run_and_open_again(trained: Path) -> None:
    assert conversion_command.run(ConvertConfig(model="first")) == Path("first-hf")
    assert is_model_of(2, open_model("first-hf").model)
    with pytest.raises(ValueError, match="first-hf"):
        conversion_command.run(ConvertConfig(model="first"))
    assert conversion_command.run(ConvertConfig(model="first", out="deep/er")) == Path("deep/er")
