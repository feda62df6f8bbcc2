"""The comparison with compressors, in the report of every run whose text is at hand."""

from __future__ import annotations

import gzip
import json
import re
import shutil

import pytest

from overnight.data.shards import load_prepared_tokenizer, open_tokens, read_manifest
from overnight.evaluation import compressors
from overnight.report.page import write_report

SECTION = "As a compressor"
SPLITS = ("train", "validation")


def report(directory) -> str:
    return " ".join(write_report(directory.path).read_text(encoding="utf-8").split())


def texts_in(prepared) -> dict[str, bytes]:
    """The text of both splits, decoded as a whole."""
    manifest, tokenizer = read_manifest(prepared), load_prepared_tokenizer(prepared)
    ids = {split: [open_tokens(prepared / each.name) for each in manifest.shards(split)] for split in SPLITS}
    return {
        split: tokenizer.decode_bytes([n for each in parts for n in each]) for split, parts in ids.items()
    }


@pytest.fixture
def use_shards(copied_run):
    """`use_shards(folder)`: the copied run, as if it had been trained on the shards there."""

    def use(folder) -> None:
        text = re.sub('(?m)^data = ".*"$', f'data = "{folder}"', copied_run.read_recipe().partition("\n")[2])
        copied_run.begin(text, json.loads(copied_run.environment.read_text()))
        assert copied_run.problems() == []

    return use


def test_report_compares_the_model_with_compressors_once(copied_run, prepared, monkeypatch):
    text = texts_in(prepared)
    page = report(copied_run)
    kept = json.loads(copied_run.compression.read_text())
    assert (kept["bytes"], kept["training_bytes"]) == (len(text["validation"]), len(text["train"]))
    gzipped = 8 * len(gzip.compress(text["validation"], 9)) / len(text["validation"])
    assert kept["bits_per_byte"]["gzip"] == gzipped
    assert f"{gzipped:.3f}</div>" in page
    assert f"the size of {len(text['train']):,} bytes of training text together" in page
    assert copied_run.problems() == []
    monkeypatch.setattr(compressors, "compressed_bits_per_byte", lambda *_, **__: pytest.fail("again"))
    assert report(copied_run) == page


def test_long_text_is_measured_on_its_beginning(copied_run, prepared, monkeypatch):
    monkeypatch.setattr(compressors, "TRAINING_BYTES", 1000)
    monkeypatch.setattr(compressors, "TEXT_BYTES", 300)
    page, text = report(copied_run), texts_in(prepared)
    expected = compressors.compressed_bits_per_byte(
        text["validation"][:300], text["train"][:1000], is_cut=True
    )
    assert json.loads(copied_run.compression.read_text())["bits_per_byte"] == expected
    assert "xz given 1,000 bytes of training text" in page
    assert "The compressors were given 300 bytes of it" in page


def test_unfinished_run_is_compared_and_keeps_nothing(copied_run):
    shutil.rmtree(copied_run.checkpoints / "step-00000012")
    assert SECTION in report(copied_run)
    assert not copied_run.compression.exists()


@pytest.mark.parametrize("case", ["the same", "none", "damaged", "another text"])
def test_only_the_shards_of_the_run_are_compared(
    case, copied_run, prepared, prepare_texts, use_shards, tmp_path
):
    folder = tmp_path / "shards"
    if case == "another text":
        folder = prepare_texts(tmp_path / "other", [f"Another text, number {n}.\n" * 9 for n in range(30)])
    elif case != "none":
        shutil.copytree(prepared, folder)
    if case == "damaged":
        shard = next(folder.glob("validation-*.bin"))
        content = bytearray(shard.read_bytes())
        content[-2] ^= 1
        shard.write_bytes(content)
    use_shards(folder)
    assert (SECTION in report(copied_run)) == (case == "the same")
    assert copied_run.compression.exists() == (case == "the same")


@pytest.mark.parametrize("file", ["data.json", "compression.json", "recipe.toml"])
@pytest.mark.parametrize("content", ["[" * 200_000, "[1]", "", '{"train": [{}], "validation": 3}', "\0"])
def test_report_of_a_damaged_run_is_written(copied_run, file, content):
    (copied_run.path / file).write_text(content)
    assert "damaged" in report(copied_run) or file == "compression.json"
    assert (copied_run.path / file).read_text() == content or file == "compression.json"
