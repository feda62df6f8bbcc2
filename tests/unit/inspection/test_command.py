from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from overnight.conversion.huggingface import write_huggingface
from overnight.data.shards import SPLITS, read_manifest
from overnight.inspection import InspectConfig
from overnight.inspection.command import describe, run
from overnight.inspection.statistics import inspect_shards
from overnight.model.gpt import GPT
from overnight.model.model_config import ModelConfig
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.tokenizer.characters import train_characters

SENTENCE = "It is well known that the days of the week are seven, and that this is one of them.\n"


@pytest.fixture
def folder(here):
    """60 prepared documents, with shards short enough for a table of them."""
    draw = random.Random(0)
    words = ["the", "of", "and", "a", "house", "on", "hill", "stood", "時", "né", "\x07", "[red]"]
    texts = [SENTENCE + " ".join(draw.choices(words, k=draw.randint(1, 300))) + f" {n}" for n in range(60)]
    Path("letters.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    paths = {"source": "letters.jsonl", "out": "letters"}
    prepare_shards(PrepareConfig(**paths, tokenizer="characters", validation_fraction=0.2, shard_tokens=2500))
    return here / "letters"


@pytest.fixture
def printed(capsys):
    """`printed(config)`: the lines of the command, none wider than 80 columns."""

    def printed(config):
        capsys.readouterr()
        run(config)
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert max(map(cell_len, lines)) <= 80
        assert all(character.isprintable() for line in lines for character in line)
        return lines

    return printed


def test_inspect_prints_the_manifests_counts(folder, printed):
    lines = printed(InspectConfig(data="letters"))
    manifest = read_manifest(folder)
    for split in SPLITS:
        (row,) = [line.split() for line in lines if line.startswith(split)]
        documents = sum(shard.documents for shard in manifest.shards(split))
        tokens, text_bytes = manifest.tokens(split), manifest.text_bytes(split)
        assert row[1:5] == [f"{documents:,}", f"{tokens:,}", f"{text_bytes:,}", f"{text_bytes / tokens:.3f}"]
    shards = [line.split()[0] for line in lines if line.startswith("  train-")]
    assert shards == [f"train-{number:05d}" for number in range(min(12, len(manifest.train)))]
    assert any("[red]" in line for line in lines)  # rich's markup in a text is text
    first = printed(InspectConfig(data="letters", documents=4, samples=0))
    assert any("first 4 documents of each split" in line for line in first)
    assert any(line.startswith("of all 8 documents") for line in first)


@pytest.mark.usefixtures("folder")
def test_inspect_shows_problems_first_and_bars_in_proportion():
    found = inspect_shards(Path("letters"))
    large = dataclasses.replace(
        found,
        splits=tuple(dataclasses.replace(split, documents=10**8, tokens=10**11) for split in found.splits),
        problems=("a problem " * 30,),
        duplicates=dataclasses.replace(found.duplicates, validation_in_train=3),
    )
    lines = list(describe(large))
    assert max(map(cell_len, lines)) <= 80
    assert lines[2].startswith("  ! a problem")
    none = "no document occurs twice, within a split or across splits"
    assert (none in describe(found), none in lines) == (True, False)
    bars = [line.count("█") for line in lines if "%" in line and "–" in line]
    counts = [bucket["documents"] for bucket in found.lengths.histogram]
    assert bars == [-(-30 * count // max(counts)) for count in counts]


@pytest.mark.usefixtures("folder")
def test_inspect_json_has_everything(capsys):
    """Its keys are in the golden file of the command."""
    capsys.readouterr()
    run(InspectConfig(data="letters", json=True, samples=2, seed=5))
    expected = inspect_shards(Path("letters"), samples=2, seed=5)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(expected)))


@pytest.mark.usefixtures("here")
def test_inspect_lists_the_sites_of_a_source(printed, capsys):
    rows = [{"url": f"https://site-{n % 25}.{'x' * (n % 25) * 3}.org/{n}", "text": "ab"} for n in range(100)]
    Path("web.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"url": "", "text": "ab"}])))
    (row,) = [line.split() for line in printed(InspectConfig(data="web.jsonl")) if line.startswith("site-1.")]
    assert row == ["site-1.xxx.org", "4", "3.96%", "0.00", "3.96%"]
    run(InspectConfig(data="web.jsonl", json=True))
    content = json.loads(capsys.readouterr().out)
    top = content.pop("top")
    assert content == {
        **{"source": "web.jsonl", "files": 1, "documents": 101, "text_bytes": 202},
        **{"documents_without": 1, "sites": 25},
    }
    assert len(top) == 25
    assert list(top[0].items())[1:] == [("documents", 4), ("text_bytes", 8)]


def test_inspect_names_the_import_of_foreign_shards(here):
    (here / "foreign").mkdir()
    (here / "foreign/train.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="--from-shards foreign"):
        run(InspectConfig(data="foreign"))


def test_inspect_needs_no_torch(folder):
    script = (
        "import sys\n"
        "from overnight.cli import main\n"
        "assert main(['inspect', 'letters', '--samples', '1']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("switches", "kind", "differs"),
    [
        ({}, "GPT2LMHeadModel", "it is a GPT-2"),
        (
            {"positions": "rotary", "normalization": "rms", "biases": False, "activation": "swiglu"},
            "LlamaForCausalLM",
            "positions=rotary, normalization=rms, biases=False, activation=swiglu",
        ),
    ],
)
def test_model_folder_is_described(printed, capsys, here, switches, kind, differs):
    tokenizer = train_characters(["the quick brown fox"])
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=8, context_length=16, vocab_size=tokenizer.vocab_size, **switches
    )
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data += 0.1
    model.zero_padding()
    write_huggingface(model, tokenizer, here / "hf")
    lines = printed(InspectConfig(data="hf"))
    text = " ".join(lines)
    assert f"hf: {kind} of Transformers" in text
    assert f"{config.parameter_count():,} parameters" in text
    assert differs in text
    run(InspectConfig(data="hf", json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["switches"] == switches
    assert found["class_name"] == kind
    Path("hf/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: model_type is None"):
        run(InspectConfig(data="hf"))
