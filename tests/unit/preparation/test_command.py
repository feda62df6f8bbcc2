from __future__ import annotations

import json
from pathlib import Path

import pytest

from overnight.data.loader import TokenStream
from overnight.data.shards import load_prepared_tokenizer, read_manifest, verify
from overnight.preparation.command import run
from overnight.preparation.prepare_config import PrepareConfig

TEXTS = [f"The letter of day {number}: all is well.\n" for number in range(200)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in [*TEXTS, TEXTS[3], "", TEXTS[4]]]
    Path("letters.jsonl").write_text("\n".join(lines))
    return PrepareConfig(source="letters.jsonl", tokenizer="characters", validation_fraction=0.1)


def test_it_says_what_the_folder_holds_and_what_comes_next(
    config: PrepareConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run(config)
    folder = Path("data/letters-characters")
    assert read_manifest(folder) == verify(folder) == manifest
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    text_bytes = sum(map(len, TEXTS))
    tokens = text_bytes + 200
    held_out = manifest.tokens("validation")
    assert lines[-6:-2] == [
        f"200 documents, {text_bytes / 1e6:,.2f} MB of text, {tokens:,} tokens",
        f"{tokens / 200:,.1f} tokens per document, {text_bytes / tokens:.3f} bytes per token",
        f"{tokens - held_out:,} tokens to train on, {held_out:,} held out ({held_out / tokens:.2%})",
        "left out: duplicates 2, empty 1",
    ]
    assert lines[-2].startswith("data/letters-characters is ready after ")
    assert lines[-1] == "next: overnight train RECIPE --data data/letters-characters"


def test_repaired_documents_are_told(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("letters.jsonl").open("ab") as file:
        file.write(b'\n{"text": "b\xe9"}\n')
    with pytest.raises(ValueError, match=r"letters\.jsonl line 204 is not UTF-8"):
        run(config)
    run(PrepareConfig(**{**config.__dict__, "on_bad_text": "replace"}))
    assert "repaired: 1 documents hold U+FFFD where a byte was bad" in capsys.readouterr().err


def test_what_was_prepared_reads_back_as_the_text(config: PrepareConfig) -> None:
    """The whole way: text, tokenizer learned from it, shards, stream, text again."""
    run(config)
    folder = Path("data/letters-characters")
    tokenizer = load_prepared_tokenizer(folder)
    stream = TokenStream(folder, "validation", tokens_per_row=16)
    ids = [id for batch in stream.evaluation_batches(4) for id in batch.targets.flatten().tolist()]
    text = tokenizer.decode([id for id in ids if id != tokenizer.end_of_text])
    assert text == "".join(letter for letter in TEXTS if letter in text)
    assert len(text) == stream.manifest.text_bytes("validation")


def test_a_corpus_has_as_many_gpt2_tokens_as_it_publishes(shared_data: Path, tmp_path: Path) -> None:
    config = PrepareConfig(
        source=str(shared_data / "corpus" / "validation.parquet"),
        out=str(tmp_path / "corpus"),
        tokenizer=str(shared_data / "gpt2-bpe"),
        validation_fraction=0.5,
    )
    manifest = run(config)
    assert (manifest.documents, manifest.vocab_size, manifest.end_of_text) == (110, 50_257, 50_256)
    # Its README and token_count column do not count end-of-text.
    assert manifest.tokens("train") + manifest.tokens("validation") == 412_940 + 110
