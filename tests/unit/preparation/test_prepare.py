from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import shards, text_files
from overnight.data import shards as shards_module
from overnight.data.shards import Manifest, open_tokens, read_manifest, verify
from overnight.preparation import assemble, prepare_state, sources, tokenize
from overnight.preparation import prepare as prepare_module
from overnight.preparation.documents import Document, filter_documents, split_of
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.tokenize import tokenize_documents

pytestmark = pytest.mark.usefixtures("byte_tokenizer")

TEXTS = [f"Document {number}: " + "word " * (number % 37) for number in range(300)]
EXACTLY_40 = sum(len(text) + 1 for text in TEXTS[:40])  # tokens of the first 40, with their separators


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    source = write_texts(tmp_path / "texts.jsonl", TEXTS)
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        tokenizer="bytes",
        validation_fraction=0.1,
        shard_tokens=5000,
    )


def contents(folder: str | Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def documents_in(folder: str | Path | None, split: str) -> list[str]:
    """The texts of one split, put together again from its shards."""
    assert folder is not None
    manifest = read_manifest(Path(folder))
    ids = np.concatenate([open_tokens(Path(folder) / shard.name) for shard in manifest.shards(split)])
    assert ids[0] == 256
    starts = np.flatnonzero(ids == 256).tolist()
    ends = [*starts[1:], ids.size]
    return [bytes(ids[start + 1 : end].tolist()).decode() for start, end in zip(starts, ends, strict=True)]


# ---------------------------------------------------------------- what is in the shards


def test_every_document_is_in_one_split_in_order(config: PrepareConfig) -> None:
    manifest = prepare(config)
    for split in ("train", "validation"):
        expected = [text for text in TEXTS if split_of(text, 0.1) == split]
        assert documents_in(config.out, split) == expected
        assert sum(shard.documents for shard in manifest.shards(split)) == len(expected)
        assert manifest.text_bytes(split) == sum(len(text.encode()) for text in expected)
        assert manifest.tokens(split) == manifest.text_bytes(split) + len(expected)
    assert manifest.documents == len(TEXTS)
    assert len(manifest.train) > 2
    assert all(shard.tokens == 5000 for shard in manifest.train[:-1])
    assert verify(Path(config.out or "")) == manifest


def test_the_manifest_says_where_it_came_from(config: PrepareConfig, byte_tokenizer: Any) -> None:
    manifest = prepare(config)
    assert (manifest.source, manifest.licence, manifest.tokenizer) == ("texts", "not stated", "bytes")
    assert (manifest.vocab_size, manifest.end_of_text) == (257, 256)
    assert manifest.tokenizer_fingerprint == byte_tokenizer.fingerprint
    assert "below 0.1 of 2^64" in manifest.split_rule
    assert str(Path(config.out or "").parent) not in manifest.to_json()  # no path of this machine
    assert (Path(config.out or "") / "tokenizer" / "learned.txt").is_file()


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=40))
def test_documents_are_conserved(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("property")
    texts += ["in train 0", "in validation 6"]
    source = write_texts(folder / "texts.jsonl", texts)
    sides = {
        split: [t for t in dict.fromkeys(texts) if t and split_of(t, 0.5) == split]
        for split in ("train", "validation")
    }
    if not all(sides.values()):
        return
    config = PrepareConfig(
        source=str(source),
        out=str(folder / "out"),
        tokenizer="bytes",
        validation_fraction=0.5,
        shard_tokens=7,
    )
    manifest = prepare(config)
    assert {split: documents_in(config.out, split) for split in sides} == sides
    left_out = manifest.duplicate_documents + manifest.empty_documents
    assert manifest.documents + left_out == len(texts)


def test_duplicates_and_empty_documents_are_left_out_and_counted(config: PrepareConfig) -> None:
    write_texts(Path(config.source), [*TEXTS, TEXTS[0], "", TEXTS[5], TEXTS[5], ""])
    manifest = prepare(config)
    assert (manifest.documents, manifest.duplicate_documents, manifest.empty_documents) == (300, 3, 2)
    assert sorted(documents_in(config.out, "train") + documents_in(config.out, "validation")) == sorted(TEXTS)


def test_no_document_changes_sides_when_others_come_or_move(config: PrepareConfig, tmp_path: Path) -> None:
    prepare(config)
    before = {split: set(documents_in(config.out, split)) for split in ("train", "validation")}
    more = TEXTS[50:] + [f"Another {number}" for number in range(100)]
    random.Random(0).shuffle(more)
    write_texts(Path(config.source), more)
    changed = dataclasses.replace(config, out=str(tmp_path / "changed"))
    prepare(changed)
    for split, texts in before.items():
        assert set(documents_in(changed.out, split)) & set(TEXTS) == texts & set(TEXTS[50:])


def test_a_learned_tokenizer_has_not_seen_the_validation_documents(config: PrepareConfig) -> None:
    write_texts(Path(config.source), [*TEXTS, TEXTS[1]])
    prepare(dataclasses.replace(config, tokenizer="learned"))
    learned = (Path(config.out or "") / "tokenizer" / "learned.txt").read_text().split("\n")
    assert learned == documents_in(config.out, "train")


def test_one_bar_is_shown_at_a_time(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once overwrite each other on a terminal."""
    opened: list[str] = []
    unfinished: list[str] = []

    @contextlib.contextmanager
    def bar(title: str, total: float | None, unit: str = "") -> Iterator[Callable[..., None]]:
        assert unfinished == []
        opened.append(title)
        unfinished.append(title)
        yield lambda amount=1, note="": None
        unfinished.remove(title)

    for module in (prepare_module, text_files, sources):
        monkeypatch.setattr(module, "progress", bar)
    monkeypatch.setattr(sources, "python_documents", lambda: (Document(text, "") for text in TEXTS))
    sources._python_docs.cache_clear()
    prepare(dataclasses.replace(config, source="python-docs", tokenizer="learned"))
    sources._python_docs.cache_clear()
    assert opened == ["hashing", "reading", "tokenizer", "encoding"]


@pytest.mark.parametrize("tokens", [1, 100, 3000, EXACTLY_40, EXACTLY_40 + 1, 10**9])
def test_it_stops_after_the_document_that_reaches_tokens(config: PrepareConfig, tokens: int) -> None:
    fraction = 0.5
    config = dataclasses.replace(config, tokens=tokens, validation_fraction=fraction)
    expected, total = [], 0
    for text in TEXTS:
        expected.append(text)
        total += len(text) + 1
        if total >= tokens:
            break
    sides = {
        split: [t for t in expected if split_of(t, fraction) == split] for split in ("train", "validation")
    }
    if not all(sides.values()):
        with pytest.raises(ValueError, match="none of the 1 documents of texts fell to"):
            prepare(config)
        return
    manifest = prepare(config)
    assert {split: documents_in(config.out, split) for split in sides} == sides
    assert manifest.documents == len(expected)


def test_bad_text_is_refused_repaired_or_skipped(config: PrepareConfig) -> None:
    path = Path(config.source)
    offset = path.stat().st_size + 14
    with path.open("ab") as file:
        file.write(b'{"text": "bad \xff"}\n')
    with pytest.raises(
        ValueError, match=rf"texts\.jsonl line 301 is not UTF-8 at byte {offset:,}; .*--on-bad-text"
    ):
        prepare(config)
    assert not Path(config.out or "").exists()
    manifest = prepare(dataclasses.replace(config, on_bad_text="skip"))
    assert (manifest.documents, manifest.skipped_documents, manifest.repaired_documents) == (300, 1, 0)
    config = dataclasses.replace(config, on_bad_text="replace", out=f"{config.out}-replaced")
    manifest = prepare(config)
    assert (manifest.documents, manifest.skipped_documents, manifest.repaired_documents) == (301, 0, 1)
    assert "bad \ufffd" in documents_in(config.out, "train") + documents_in(config.out, "validation")


def test_parquet_makes_the_same_shards(config: PrepareConfig, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "texts.parquet")
    other = dataclasses.replace(
        config, source=str(tmp_path / "texts.parquet"), text_column="body", out=str(tmp_path / "parquet")
    )
    assert prepare(config).train == prepare(other).train


# ---------------------------------------------------------------- the same bytes


def test_the_shards_do_not_depend_on_workers_or_batches(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config)
    expected = contents(config.out)
    for workers, characters in ((1, 1), (2, 500), (7, 3000)):
        monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", characters)
        other = dataclasses.replace(config, workers=workers, out=f"{config.out}-{workers}")
        prepare(other)
        assert contents(other.out) == expected


def test_the_separator_stands_before_a_document_and_what_is_left_out_has_no_ids(byte_tokenizer: Any) -> None:
    judged = filter_documents([Document(text, "") for text in ("ab", "ab", "", "c")], "fail")
    ids = [ids.tolist() for _, _, ids in tokenize_documents(judged, byte_tokenizer)]
    assert ids == [[256, 97, 98], [256, 97, 98], [], [256, 99]]


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_threads_reads_equally_far_ahead(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 1)
    judged = filter_documents((Document(text, "") for text in TEXTS), "fail")
    encoded = tokenize_documents(judged, byte_tokenizer, workers)
    next(encoded)
    encoded.close()
    assert next(judged)[0].text == TEXTS[tokenize.BATCHES_AHEAD + 1]


SCRIPT = """
import sys
from overnight.preparation.prepare import prepare
from overnight.preparation.prepare_config import PrepareConfig
prepare(PrepareConfig(source=sys.argv[1], out=sys.argv[2], tokenizer="characters", validation_fraction=0.1))
"""


def start(config: PrepareConfig, out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, config.source, str(out)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_with_other_settings_write_the_same_bytes(config: PrepareConfig, tmp_path: Path) -> None:
    settings_of = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONUTF8": "0"},
    ]
    processes = [start(config, tmp_path / str(i), **each) for i, each in enumerate(settings_of)]
    assert [process.communicate()[1][-200:] * process.returncode for process in processes] == ["", ""]
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_processes_at_work_in_one_folder_write_it_once(config: PrepareConfig, tmp_path: Path) -> None:
    processes = [start(config, tmp_path / "shared") for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert sum("encoding:" in error for error in errors) == 1
    assert sum("holds this already" in error for error in errors) == 3
    verify(tmp_path / "shared")


# ---------------------------------------------------------------- killed, or out of space


STEPS = [
    (tokenize, "flush_to_disk", 1),
    (tokenize, "write_atomically", 2),
    (assemble, "write_atomically", 3),
    (shards_module.TokenFile, "append", 5),
    (shards_module.TokenFile, "close", 3),
    (shards_module, "flush_to_disk", 3),
    (shards_module, "flush_folder", 2),
    (prepare_state, "write_atomically", 2),
    (shards, "write_atomically", 1),
    (Path, "rename", 2),
    (Path, "mkdir", 3),
]


@pytest.mark.parametrize("owner,name,times", STEPS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_after_a_failure_at_any_step_the_same_command_completes_it(
    config: PrepareConfig, owner: Any, name: str, times: int, error: BaseException, tmp_path: Path
) -> None:
    expected = dataclasses.replace(config, out=str(tmp_path / "expected"))
    prepare(expected)
    out = Path(config.out or "")
    for failing in range(times):
        with pytest.MonkeyPatch.context() as patch:
            count = 0
            real = getattr(owner, name)

            def fail(*arguments: Any, failing: int = failing, real: Any = real, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == failing + 1:
                    raise error
                return real(*arguments, **options)

            patch.setattr(owner, name, fail)
            with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
                prepare(config)
            assert count == failing + 1
        if isinstance(raised.value, ValueError):
            assert "is full: free some and give the same command again" in str(raised.value)
        assert not out.exists()
        prepare(config)
        assert not out.with_name(".out.partial").exists()
        assert contents(out) == contents(expected.out)
        shutil.rmtree(out)


KILLED = (
    """
import os, sys
countdown, place = int(sys.argv[1]), os.path.dirname(sys.argv[3])
def count(event, arguments):
    global countdown
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if place in str(arguments[:1]) and (writes or event in ("os.rename", "os.mkdir")):
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
sys.argv[1:] = sys.argv[2:]
"""
    + SCRIPT
)


def test_killed_at_any_write_it_leaves_no_folder_and_goes_on(config: PrepareConfig, tmp_path: Path) -> None:
    start(config, tmp_path / "elsewhere" / "out").communicate()
    out, killed = tmp_path / "out", 0
    for countdown in range(1, 100, 5):
        command = [sys.executable, "-c", KILLED, str(countdown), config.source, str(out)]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode == 0:
            break
        killed += 1
        assert process.returncode == -9
        assert not out.exists()
    assert killed >= 4
    assert contents(out) == contents(tmp_path / "elsewhere" / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_too_small_a_disk_is_found_before_anything_is_written(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(shards_module.TokenFile, "append", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match=r"the shards need about .* GB .* or stop earlier with --tokens"):
        prepare(config)
    assert not Path(config.out or "").exists()


def test_the_space_needed_is_estimated_from_the_first_documents(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(prepare_module, "require_disk_space", lambda folder, size: needed.append(size))
    manifest = prepare(config)
    written = sum(1024 + 2 * shard.tokens for shard in manifest.train + manifest.validation)
    assert 1.8 < needed[0] / written < 5  # the units lie there until the shards are written
    prepare(dataclasses.replace(config, tokens=3000, out=f"{config.out}-less"))
    assert needed[1] == pytest.approx(2 * 1.1 * 3000 * 2 + 2048)


# ---------------------------------------------------------------- asked for again


def test_the_same_request_is_reused(
    config: PrepareConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config)
    for name in ("_fill", "alone"):  # a lock would need a folder that may be written to
        monkeypatch.setattr(prepare_module, name, lambda *_: pytest.fail("prepared again"))
    assert prepare(config) == first
    assert "holds this already, and it is sound" in capsys.readouterr().err
    assert prepare(dataclasses.replace(config, workers=3)) == first  # nothing that decides the content


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tokenizer": "learned"}, "tokenizer is bytes there and learned here"),
        ({"validation_fraction": 0.2}, r"validation_fraction is 0\.1 there and 0\.2 here"),
        ({"tokens": 500}, "tokens is None there and 500 here"),
        ({"shard_tokens": 6000}, "shard_tokens is 5000 there and 6000 here"),
        ({"on_bad_text": "skip"}, "on_bad_text is fail there and skip here"),
    ],
)
def test_another_request_is_refused(config: PrepareConfig, change: dict[str, Any], message: str) -> None:
    prepare(config)
    before = contents(config.out)
    with pytest.raises(
        ValueError, match=rf"out holds something else \({message}\): give another --out, or delete it"
    ):
        prepare(dataclasses.replace(config, **change))
    assert contents(config.out) == before


def test_changed_text_is_refused(config: PrepareConfig) -> None:
    prepare(config)
    write_texts(Path(config.source), [*TEXTS, "One more."])
    with pytest.raises(ValueError, match="the text of the source has changed since"):
        prepare(config)


def test_a_changed_tokenizer_under_the_same_name_is_refused(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "learned.txt").write_text("one")
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "mine"))
    prepare(config)
    prepare(config)
    (tmp_path / "mine" / "learned.txt").write_text("two")
    with pytest.raises(ValueError, match="tokenizer is mine [0-9a-f]{64} there"):
        prepare(config)


def test_a_damaged_folder_is_not_reused(config: PrepareConfig) -> None:
    prepare(config)
    path = Path(config.out or "") / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(
        ValueError, match=r"train-00001\.bin was changed since .*delete the folder and prepare it again"
    ):
        prepare(config)


@pytest.mark.parametrize("make", [lambda out: out.mkdir() or (out / "mine").touch(), lambda out: out.touch()])
def test_a_folder_that_is_not_ours_is_left_alone(config: PrepareConfig, make: Callable[[Path], None]) -> None:
    out = Path(config.out or "")
    make(out)
    with pytest.raises(ValueError, match="out is there and holds no shards of ours; give another --out"):
        prepare(config)
    assert out.exists()


def test_an_empty_folder_is_filled(config: PrepareConfig) -> None:
    Path(config.out or "").mkdir()
    assert prepare(config).documents == 300


# ---------------------------------------------------------------- nothing to do


@pytest.mark.parametrize("texts,message", [([], "texts holds no text"), (["", ""], "texts holds no text")])
def test_a_source_without_text_is_refused(config: PrepareConfig, texts: list[str], message: str) -> None:
    write_texts(Path(config.source), texts)
    with pytest.raises(ValueError, match=message):
        prepare(config)
    assert not Path(config.out or "").exists()


def test_an_empty_split_is_refused_with_the_remedy(config: PrepareConfig) -> None:
    with pytest.raises(
        ValueError, match=r"none of the 300 documents of texts fell to validation, .*raise --validation"
    ):
        prepare(dataclasses.replace(config, validation_fraction=1e-9))
    with pytest.raises(
        ValueError, match=r"none of the 300 documents of texts fell to train, .*lower --validation"
    ):
        prepare(dataclasses.replace(config, validation_fraction=1 - 1e-9))
    assert not Path(config.out or "").exists()


def test_all_problems_are_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prepare: validation_fraction=2 must .*; tokens=0 must"):
        prepare(PrepareConfig(source=str(tmp_path), validation_fraction=2, tokens=0))


def test_the_manifest_is_the_return_value(config: PrepareConfig) -> None:
    manifest: Manifest = prepare(config)
    assert manifest == read_manifest(Path(config.out or ""))
