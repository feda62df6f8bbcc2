from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overnight.data.shards import verify
from overnight.preparation.command import run
from overnight.preparation.prepare_config import PrepareConfig

TEXTS = [f"The letter of day {number}: all is well.\n" for number in range(200)]
FOLDER = Path("data/letters-characters")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_texts: Any) -> PrepareConfig:
    monkeypatch.chdir(tmp_path)
    write_texts(Path("letters.jsonl"), [*TEXTS, TEXTS[3], "", TEXTS[4]])
    return PrepareConfig(source="letters.jsonl", tokenizer="characters", validation_fraction=0.1)


def test_summary_and_next_command(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("letters.jsonl").open("ab") as file:
        file.write(b'{"text": "b\xe9"}\n')
    manifest = run(PrepareConfig(**{**vars(config), "on_bad_text": "replace"}))
    assert verify(FOLDER) == manifest
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("201 documents", "duplicates 2, empty 1", "repaired: 1 ", f"train RECIPE --data {FOLDER}"):
        assert part in captured.err
