"""Models by name: runs, checkpoints, folders, and a stand-in for the Hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from overnight.conversion import ConvertConfig
from overnight.conversion import command as conversion_command
from overnight.conversion import open_model as open_model_module
from overnight.conversion.huggingface import write_huggingface
from overnight.conversion.open_model import open_model
from overnight.generation import GenerateConfig
from overnight.generation import command as generation_command
from overnight.generation.quantize import DecodingPrecision, generation_precisions
from overnight.model.gpt import GPT, initialize
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
    model = GPT(ModelConfig(**sizes, vocab_size=TOKENIZER.vocab_size))
    initialize(model, seed)
    return model.eval()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(place: Path) -> Path:
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


@pytest.mark.parametrize("name", ["runs/first", "first", "runs/first/checkpoints/step-00000002"])
def test_a_run_is_opened_at_its_newest_checkpoint(trained: Path, name: str) -> None:
    opened = open_model(name)
    assert is_model_of(2, opened.model)
    assert not opened.model.training
    assert opened.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert opened.run == trained
    assert opened.origin == trained / "checkpoints/step-00000002"
    assert opened.tokenizer_folder == trained / "tokenizer"


def test_an_older_checkpoint_is_opened_by_its_path(trained: Path) -> None:
    assert is_model_of(1, open_model("runs/first/checkpoints/step-00000001").model)


def test_a_damaged_newest_checkpoint_is_passed_over(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "checkpoints/step-00000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert is_model_of(1, open_model("first").model)
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_a_hugging_face_folder_is_opened(place: Path) -> None:
    write_huggingface(build_model(5), TOKENIZER, place / "theirs")
    opened = open_model("theirs")
    assert is_model_of(5, opened.model)
    assert opened.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert opened.run is None
    assert opened.tokenizer_folder == opened.origin == Path("theirs")
    (place / "theirs" / "metrics.jsonl").write_text("{}\n")  # somebody's, which makes it no run
    assert is_model_of(5, open_model("theirs").model)


@pytest.mark.parametrize(
    ("name", "repository"), [("gpt2", "openai-community/gpt2"), ("owner/some-model", "owner/some-model")]
)
def test_a_name_on_the_hub_is_fetched(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str
) -> None:
    write_huggingface(build_model(6), TOKENIZER, place / "cache")
    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(place / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert is_model_of(6, open_model(name).model)
    ((found, patterns),) = asked
    assert found == repository
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)


def test_without_a_network_it_is_said_what_to_fetch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    with pytest.raises(
        ValueError, match="cannot be fetched .*: put config.json, model.safetensors"
    ) as raised:
        open_model("gpt2-medium")
    assert "openai-community/gpt2-medium into a folder" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_the_extra_it_is_said_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'overnight\[hub\]'"):
        open_model("gpt2")


def test_only_plausible_names_go_to_the_hub() -> None:
    assert open_model_module.repository("gpt2-xl") == "openai-community/gpt2-xl"
    assert open_model_module.repository("a/b.c-d_e") == "a/b.c-d_e"
    for name in ("", "math", "a/b/c", "../x", "/x", "a/", "a/../b", "https://x/y", "a b/c"):
        assert open_model_module.repository(name) is None


def test_an_unknown_name_is_answered_with_the_nearest(trained: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no model frist: .* a run in runs/.* did you mean first\?"
    ):
        open_model("frist")
    with pytest.raises(ValueError, match=r"did you mean runs/first\?"):
        open_model("runs/frist")  # never asked of the Hub: runs/ is a folder here
    with pytest.raises(ValueError, match="there is no model : "):
        open_model("")


def test_an_unknown_name_without_runs(place: Path) -> None:
    with pytest.raises(ValueError, match=r"OWNER/NAME\)$"):
        open_model("nothing")


def test_folders_without_a_model_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="checkpoints holds no model: neither a run"):
        open_model("runs/first/checkpoints")
    shutil.move(trained / "checkpoints/step-00000002", "alone")
    with pytest.raises(ValueError, match="alone needs its run's tokenizer"):
        open_model("alone")
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(ValueError, match="runs/first has no checkpoint yet"):
        open_model("first")


def test_a_checkpoint_of_nanogpt_is_opened_and_converted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overnight.conversion.nanogpt.load_tokenizer", lambda name: TOKENIZER)
    model = build_model(7)
    state = {f"transformer.{name}": weight for name, weight in model.weights().items()}
    torch.save({"model": state, "model_args": {"n_head": 2, "block_size": 16}}, place / "ckpt.pt")
    opened = open_model("ckpt.pt")
    assert is_model_of(7, opened.model)
    assert (opened.run, opened.origin, str(opened.tokenizer_folder)) == (None, Path("ckpt.pt"), "gpt2")
    assert conversion_command.run(ConvertConfig(model="ckpt.pt")) == Path("ckpt-hf")
    assert is_model_of(7, open_model("ckpt-hf").model)
    (place / "no-model").write_text("hello")
    with pytest.raises(
        ValueError, match=r"no-model is not read: it is cut short, damaged, or not written by"
    ):
        open_model("no-model")


# generate and convert, as the commands call them


def test_text_is_streamed_after_its_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(model="first", prompts=("the quick",), max_new_tokens=30, seed=1)
    generation_command.run(config)
    first = capsys.readouterr()
    assert first.out.startswith("the quick")
    assert first.out.endswith("\n")
    assert "tokens/s on cpu" in first.err
    assert "next: overnight convert first --to hf" in first.err
    generation_command.run(config)
    assert capsys.readouterr().out == first.out


def test_json_has_one_object_for_each_completion(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(
        model="first", prompts=("the", "fox"), samples=6, json=True, max_new_tokens=7, device="cpu"
    )
    generation_command.run(config)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the"] * 6 + ["fox"] * 6
    assert len({line["completion"] for line in lines}) > 6  # each sample has its own noise
    assert all(line["tokens"] == 7 or line["ended_by"] == "end of text" for line in lines)
    assert {line["precision"] for line in lines} == {generation_precisions("cpu")[0]}
    single = GenerateConfig(model="first", prompts=("the",), max_new_tokens=7, device="cpu")
    generation_command.run(single)
    assert capsys.readouterr().out == "the" + lines[0]["completion"] + "\n"


def test_stop_and_several_samples(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(model="first", samples=3, stop=("e", "o"), max_new_tokens=50, temperature=2.0)
    generation_command.run(dataclasses.replace(config, json=True))
    texts = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    assert len(texts) == 3
    assert not {"e", "o"} & set("".join(texts))
    generation_command.run(config)
    assert capsys.readouterr().out == "\n".join(text + "\n" for text in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 2.0}, r"top_p=2\.0"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ("",)}, "a stop text is empty"),
        ({"device": "abacus"}, "device=abacus"),
        ({"prompts": ("the quick brown fox",)}, "the prompt has 19 tokens and the model reads at most 16"),
    ],
)
def test_what_cannot_be_generated_is_said(trained: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation_command.run(GenerateConfig(model="first", **changes))


@pytest.mark.parametrize("precision", generation_precisions("cpu"))
def test_a_precision_is_taken_and_told(
    trained: Path, capsys: pytest.CaptureFixture[str], precision: DecodingPrecision
) -> None:
    generation_command.run(GenerateConfig(model="first", prompts=("the",), precision=precision, device="cpu"))
    assert f"tokens/s on cpu in {precision}" in capsys.readouterr().err


def test_a_precision_that_the_device_lacks_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "overnight.generation.quantize.generation_precisions", lambda device: ("fp16", "fp32")
    )
    with pytest.raises(ValueError, match="precision=bf16 is not for cpu; take fp16 or fp32"):
        generation_command.run(GenerateConfig(model="no-such-model", precision="bf16", device="cpu"))


def test_half_a_surrogate_pair_is_survived(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation_command.run(GenerateConfig(model="first", prompts=("a\udcff",), max_new_tokens=2))
    assert capsys.readouterr().out.startswith("a?")


def test_a_run_is_converted_and_opened_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conversion_command.run(ConvertConfig(model="first")) == Path("first-hf")
    assert "next: overnight generate first-hf" in capsys.readouterr().err
    assert is_model_of(2, open_model("first-hf").model)
    with pytest.raises(ValueError, match="first-hf is already there"):
        conversion_command.run(ConvertConfig(model="first"))
    assert conversion_command.run(ConvertConfig(model="first", out="deep/er")) == Path("deep/er")
