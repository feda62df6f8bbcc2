from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.data import DataConfig, MixtureSource, shards, text_files
from overnight.data.atomic_folder import staging_path
from overnight.data.shards import SPLITS, read_manifest, verify
from overnight.preparation import assemble, prepare_state, sources, tokenize
from overnight.preparation import prepare as prepare_module
from overnight.preparation.command import run
from overnight.preparation.documents import Document, filter_documents, split_of
from overnight.preparation.identity import find_prepared, text_request
from overnight.preparation.prepare import ensure_prepared, prepare_folder, prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
from overnight.preparation.tokenize import tokenize_documents

pytestmark = pytest.mark.usefixtures("byte_tokenizer")

TEXTS = [f"Document {number}: " + "word " * (number % 37) for number in range(300)]
EXACTLY_40 = sum(len(text) + 1 for text in TEXTS[:40])  # tokens of the first 40, with their separators


@pytest.fixture
def config(tmp_path: Path, write_texts: Any) -> PrepareConfig:
    return PrepareConfig(
        source=str(write_texts(tmp_path / "texts.jsonl", TEXTS)),
        out=str(tmp_path / "out"),
        tokenizer="bytes",
        validation_fraction=0.1,
        shard_tokens=5000,
    )


def out_of(config: PrepareConfig) -> Path:
    return Path(config.out)


def by_split(texts: list[str], fraction: float) -> dict[str, list[str]]:
    return {split: [text for text in texts if split_of(text, fraction) == split] for split in SPLITS}


# The content of the shards


def test_manifest_describes_the_shards(config: PrepareConfig, texts_in: Any, byte_tokenizer: Any) -> None:
    manifest = prepare_shards(config)
    assert texts_in(config) == (expected := by_split(TEXTS, 0.1))
    for split, texts in expected.items():
        assert sum(shard.documents for shard in manifest.shards(split)) == len(texts)
        assert manifest.text_bytes(split) == sum(len(text.encode()) for text in texts)
        assert manifest.tokens(split) == manifest.text_bytes(split) + len(texts)
    assert len(manifest.train) > 2
    assert all(shard.tokens == 5000 for shard in manifest.train[:-1])
    assert verify(out_of(config)) == read_manifest(out_of(config)) == manifest
    assert (manifest.source, manifest.licence, manifest.tokenizer) == ("texts", "not stated", "bytes")
    assert (manifest.vocab_size, manifest.end_of_text) == (257, 256)
    assert manifest.tokenizer_fingerprint == byte_tokenizer.fingerprint
    assert str(out_of(config).parent) not in manifest.to_json()  # no path of this machine


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=40))
def test_documents_are_conserved(
    tmp_path_factory: pytest.TempPathFactory, write_texts: Any, texts_in: Any, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("property")
    texts += ["in train 0", "in validation 6"]
    sides = by_split([text for text in dict.fromkeys(texts) if text], 0.5)
    if not all(sides.values()):
        return
    config = PrepareConfig(
        source=str(write_texts(folder / "texts.jsonl", texts)),
        out=str(folder / "out"),
        tokenizer="bytes",
        validation_fraction=0.5,
        shard_tokens=7,
    )
    manifest = prepare_shards(config)
    assert texts_in(config) == sides
    counts = (manifest.documents, manifest.empty_documents, manifest.duplicate_documents)
    documents, empty = sum(map(len, sides.values())), texts.count("")
    assert counts == (documents, empty, len(texts) - documents - empty)


def test_trained_tokenizer_has_not_seen_validation(
    config: PrepareConfig, write_texts: Any, texts_in: Any
) -> None:
    write_texts(Path(config.source), [*TEXTS, TEXTS[1]])
    prepare_shards(dataclasses.replace(config, tokenizer="learned"))
    learned = (out_of(config) / "tokenizer" / "learned.txt").read_text().split("\n")
    assert learned == [text for text in TEXTS if split_of(text, 0.1) == "train"]


def test_one_progress_bar_at_a_time(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
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

    for module in (tokenize, text_files, sources):
        monkeypatch.setattr(module, "progress", bar)
    monkeypatch.setattr(sources, "python_texts", lambda: iter(TEXTS))
    sources.parse_python_docs.cache_clear()
    prepare_shards(dataclasses.replace(config, source="python-docs", tokenizer="learned"))
    sources.parse_python_docs.cache_clear()
    assert opened == ["hashing", "reading", "tokenizer", "encoding"]


def test_unit_that_is_completed_while_it_is_measured_is_no_error(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tokenizer", "units"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "learned.txt").touch()
    (tmp_path / "units" / "00000.ids.partial").write_bytes(bytes(8))
    listed = list(os.scandir(tmp_path / "units"))
    (tmp_path / "units" / "00000.ids.partial").rename(tmp_path / "units" / "00000.ids")
    assert tokenize.count_tokenized(tmp_path, SimpleNamespace(unit_bytes=(10,))) == (1e-5, 4)
    monkeypatch.setattr(os, "scandir", lambda _: listed)
    assert tokenize.count_tokenized(tmp_path, SimpleNamespace(unit_bytes=(10,))) == (0, 0)


@pytest.mark.parametrize("tokens", [1, 100, 3000, EXACTLY_40, EXACTLY_40 + 1, 10**9])
def test_tokens_limit_stops_after_a_document(config: PrepareConfig, texts_in: Any, tokens: int) -> None:
    config = dataclasses.replace(config, tokens=tokens, validation_fraction=0.5)
    ends = itertools.accumulate(len(text) + 1 for text in TEXTS)
    expected = TEXTS[: 1 + sum(end < tokens for end in ends)]
    sides = by_split(expected, 0.5)
    if not all(sides.values()):
        with pytest.raises(ValueError, match="--validation-fraction"):
            prepare_shards(config)
        return
    manifest = prepare_shards(config)
    assert texts_in(config) == sides
    assert manifest.documents == len(expected)


def test_bad_text_is_refused_repaired_or_skipped(config: PrepareConfig, texts_in: Any) -> None:
    path = Path(config.source)
    offset = path.stat().st_size + 14
    with path.open("ab") as file:
        file.write(b'{"text": "bad \xff"}\n')
    with pytest.raises(ValueError, match=rf"texts\.jsonl line 301 .* byte {offset:,}; .*--on-bad-text"):
        prepare_shards(config)
    assert not out_of(config).exists()
    for policy, counts in (("skip", (300, 1, 0)), ("replace", (301, 0, 1))):
        other = dataclasses.replace(config, on_bad_text=policy, out=f"{config.out}-{policy}")
        manifest = prepare_shards(other)
        assert (manifest.documents, manifest.skipped_documents, manifest.repaired_documents) == counts
        assert ("bad \ufffd" in sum(texts_in(other).values(), [])) == (policy == "replace")


def test_summary_and_next_command(
    config: PrepareConfig, write_texts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        config, source=str(Path(config.source).parent / "my notes"), out=f"{config.out} of mine"
    )
    Path(config.source).mkdir()
    (Path(config.source) / "a.csv").write_text("1")
    path = write_texts(Path(config.source) / "texts.jsonl", [*TEXTS, TEXTS[3], "", TEXTS[4]])
    with path.open("ab") as file:
        file.write(b'{"text": "b\xe9"}\n')
    assert run(dataclasses.replace(config, on_bad_text="replace")) == verify(out_of(config))
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in (
        "301 documents",
        "duplicates 2, empty 1",
        "repaired: 1 ",
        f"RECIPE --data '{config.out}'",
        "left alone: 1 .csv (1 bytes)",
    ):
        assert part in captured.err


# The same bytes


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_threads_reads_equally_far(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 1)
    documents = filter_documents(map(Document, TEXTS), "fail")
    encoded = tokenize_documents(documents, byte_tokenizer, workers)
    next(encoded)
    encoded.close()
    assert next(documents).text == TEXTS[tokenize.BATCHES_AHEAD + 1]


SCRIPT = """
import sys
from overnight.preparation.prepare import prepare_shards
from overnight.preparation.prepare_config import PrepareConfig
config = PrepareConfig(source=sys.argv[1], out=sys.argv[2], tokenizer="characters", validation_fraction=0.1)
prepare_shards(config)
"""


def start(config: PrepareConfig, out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(config.source), str(out)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_environment_does_not_change_the_bytes(config: PrepareConfig, tmp_path: Path, contents: Any) -> None:
    environments = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONUTF8": "0"},
    ]
    processes = [start(config, tmp_path / str(i), **each) for i, each in enumerate(environments)]
    assert [process.communicate()[1][-200:] * process.returncode for process in processes] == ["", ""]
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_processes_in_one_folder_write_it_once(config: PrepareConfig, tmp_path: Path) -> None:
    processes = [start(config, tmp_path / "shared") for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert sum("encoding:" in error for error in errors) == 1
    verify(tmp_path / "shared")


# Killed, or out of space

STEPS = [
    (tokenize, "flush_to_disk", 1),
    (tokenize, "write_atomically", 2),
    (assemble, "write_atomically", 3),
    (shards.TokenFile, "append", 5),
    (shards.TokenFile, "close", 3),
    (shards, "flush_to_disk", 3),
    (shards, "flush_folder", 2),
    (prepare_state, "write_atomically", 2),
    (shards, "write_atomically", 1),
    (Path, "rename", 2),
    (Path, "mkdir", 3),
]


@pytest.mark.parametrize("owner,name,times", STEPS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_after_a_failure_the_same_command_completes_it(
    config: PrepareConfig, contents: Any, owner: Any, name: str, times: int, error: BaseException
) -> None:
    expected = dataclasses.replace(config, out=f"{config.out}-expected")
    prepare_shards(expected)
    for failing in range(1, times + 1):
        with pytest.MonkeyPatch.context() as patch:
            calls: list[None] = []
            real = getattr(owner, name)

            def fail(
                *given: Any, failing: int = failing, calls: list[None] = calls, real: Any = real, **more: Any
            ) -> Any:
                calls.append(None)
                if len(calls) == failing:
                    raise error
                return real(*given, **more)

            patch.setattr(owner, name, fail)
            with pytest.raises((ValueError, KeyboardInterrupt)) as raised:
                prepare_shards(config)
            assert len(calls) == failing
        assert not isinstance(raised.value, ValueError) or "is full" in str(raised.value)
        assert not out_of(config).exists()
        prepare_shards(config)
        assert not staging_path(out_of(config)).exists()
        assert contents(config.out) == contents(expected.out)
        shutil.rmtree(out_of(config))


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


def test_killed_at_any_write_it_leaves_no_folder_and_continues(
    config: PrepareConfig, tmp_path: Path, contents: Any
) -> None:
    start(config, tmp_path / "elsewhere" / "out").communicate()
    out, killed = tmp_path / "out", 0
    for countdown in range(1, 100, 5):
        command = [sys.executable, "-c", KILLED, str(countdown), str(config.source), str(out)]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode == 0:
            break
        killed += 1
        assert process.returncode == -9
        assert not out.exists()
    assert killed >= 4
    assert contents(out) == contents(tmp_path / "elsewhere" / "out")
    assert not staging_path(out).exists()


def test_disk_space_is_estimated_from_the_first_documents(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "require_disk_space", lambda folder, size: needed.append(size))
        manifest = prepare_shards(config)
        prepare_shards(dataclasses.replace(config, tokens=3000, out=f"{config.out}-less"))
    written = sum(1024 + 2 * shard.tokens for shard in manifest.train + manifest.validation)
    assert 1.8 < needed[0] / written < 5  # the units are there until the shards are written
    assert needed[1] == pytest.approx(2 * 1.1 * 3000 * 2 + 2048)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(shards.TokenFile, "append", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match="kB free: .*--tokens"):
        prepare_shards(dataclasses.replace(config, out=f"{config.out}-full"))
    assert not Path(f"{config.out}-full").exists()


# Asked for again


def test_same_request_is_reused(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_shards(config)
    for name in ("_plan_work", "exclusive"):  # a lock would need a folder that may be written to
        monkeypatch.setattr(prepare_module, name, lambda *_: pytest.fail("prepared again"))
    assert prepare_shards(config) == first
    assert prepare_shards(dataclasses.replace(config, workers=3)) == first  # does not decide the content


def test_another_request_is_refused(config: PrepareConfig, contents: Any) -> None:
    prepare_shards(config)
    before = contents(config.out)
    for name, value in {
        **{"tokenizer": "learned", "validation_fraction": 0.2, "tokens": 500, "shard_tokens": 6000},
        "on_bad_text": "skip",
    }.items():
        with pytest.raises(ValueError, match=rf"out .*{name}.*--out"):
            prepare_shards(dataclasses.replace(config, **{name: value}))
    assert contents(config.out) == before


def test_changed_text_or_tokenizer_is_refused(
    config: PrepareConfig, tmp_path: Path, write_texts: Any
) -> None:
    learned = tmp_path / "mine" / "learned.txt"
    learned.parent.mkdir()
    learned.write_text("one")
    config = dataclasses.replace(config, tokenizer=str(learned.parent))
    assert prepare_shards(config) == prepare_shards(config)
    learned.write_text("two")
    with pytest.raises(ValueError, match="tokenizer was mine [0-9a-f]{64}, and is now mine"):
        prepare_shards(config)
    learned.write_text("one")
    write_texts(Path(config.source), [*TEXTS, "One more."])
    with pytest.raises(ValueError, match="text of the source"):
        prepare_shards(config)


def test_damaged_or_foreign_folder_is_left_alone(config: PrepareConfig) -> None:
    out_of(config).mkdir()
    assert prepare_shards(config).documents == 300  # an empty folder is filled
    path = out_of(config) / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"train-00001\.bin"):
        prepare_shards(config)
    (out_of(config) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="--out"):
        prepare_shards(config)
    assert path.exists()
    shutil.rmtree(out_of(config))
    out_of(config).touch()
    with pytest.raises(ValueError, match="--out"):
        prepare_shards(config)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"validation_fraction": 2, "tokens": 0}, "validation_fraction=2 .*tokens=0"),
        ({"validation_fraction": 1e-9}, "raise --validation-fraction"),
        ({"validation_fraction": 1 - 1e-9}, "lower --validation-fraction"),
        ({"shard_tokens": 3000}, "--shard-tokens"),
        ({"text_column": "number"}, "holds no text"),
    ],
)
def test_impossible_request_leaves_nothing(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    monkeypatch.setattr(assemble, "MOST_SHARDS", 9)
    if "text_column" in changes:
        Path(config.source).write_text('{"number": ""}\n')
    with pytest.raises(ValueError, match=message):
        prepare_shards(dataclasses.replace(config, **changes))
    assert not out_of(config).exists()


# The texts of a recipe


@pytest.fixture
def recipe_data(config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.chdir(tmp_path)
    return DataConfig(data="texts.jsonl", tokenizer="bytes", validation_fraction=0.1)


def test_ensure_prepared_prepares_once(
    recipe_data: DataConfig, write_texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(Path("more.jsonl"), TEXTS[:100])
    sources = tuple(MixtureSource(path=f"{name}.jsonl", weight=1.0) for name in ("texts", "more"))
    mixture = dataclasses.replace(recipe_data, mixture=sources)
    found = ensure_prepared(mixture)
    assert [source.path for source in found.mixture] == ["data/texts-bytes", "data/more-bytes"]
    for source in found.mixture:
        verify(Path(source.path))
    monkeypatch.setattr(prepare_module, "prepare_folder", lambda _: pytest.fail("prepared again"))
    assert ensure_prepared(mixture) == ensure_prepared(found) == found
    assert ensure_prepared(recipe_data) == dataclasses.replace(recipe_data, data="data/texts-bytes")
    remote = dataclasses.replace(recipe_data, data="memory://prepared")
    monkeypatch.setattr(prepare_module, "is_prepared_elsewhere", lambda path: path == remote.data)
    assert ensure_prepared(remote) == remote


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"data": "v2/texts.jsonl"}, "the text of the source is another, or was edited since"),
        ({"validation_fraction": 0.2}, "validation_fraction was 0.1, and is now 0.2"),
        ({"tokenizer": "mine"}, r"tokenizer was mine \w+, and is now mine \w+"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_a_folder_of_the_same_name_with_other_data_is_never_used(
    recipe_data: DataConfig,
    write_texts: Any,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    difference: str,
    is_complete: bool,
) -> None:
    Path("v2").mkdir()
    write_texts(Path("v2/texts.jsonl"), TEXTS[:200])
    (tokenizer := Path("mine")).mkdir()
    (tokenizer / "learned.txt").write_text("one")
    if "tokenizer" in changes:
        recipe_data = dataclasses.replace(recipe_data, tokenizer="mine")
    first = Path(ensure_prepared(recipe_data).data)
    (tokenizer / "learned.txt").write_text("two")
    if not is_complete:  # as a preparation of the first text leaves it when it is stopped
        staging = staging_path(first)
        first.rename(staging)
    before = {path: path.read_bytes() for path in first.parent.rglob("*") if path.is_file()}
    other = dataclasses.replace(recipe_data, shuffle_window=1000, **changes)
    capsys.readouterr()
    found = Path(ensure_prepared(other).data)
    assert re.fullmatch(rf"data/{first.name}-[0-9a-f]{{8}}", str(found))
    assert re.search(
        rf"^data/{first.name} holds other data \({difference}\): using {found} instead",
        capsys.readouterr().err,
        re.M,
    )
    assert verify(found).documents == (200 if "data" in changes else 300)
    assert ensure_prepared(other).data == str(found)
    assert find_prepared(text_request(other.data, other)) == found
    assert {path: path.read_bytes() for path in before} == before
    if is_complete and "tokenizer" not in changes:  # negative control: the first text keeps its own folder
        assert ensure_prepared(recipe_data).data == str(first)
    with pytest.raises(ValueError, match=f"{found} holds other data .*another --out"):
        prepare_shards(dataclasses.replace(text_request(other.data, other), out=str(found), tokens=9000))


def test_published_text_that_is_prepared_needs_no_network(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(config, source="fineweb-edu", out=None)
    hub = [text_files.TextFile(str(tmp_path / "texts.jsonl"), "a.jsonl", 9)]
    with monkeypatch.context() as online:
        online.setattr(sources, "find_files", lambda _: hub)
        assert prepare_folder(asked) == Path("data/fineweb-edu-bytes")

    def refuse(_: str) -> None:
        raise ValueError("no route")

    monkeypatch.setattr(sources, "find_files", refuse)
    assert find_prepared(asked) == prepare_folder(asked) == Path("data/fineweb-edu-bytes")
    for changes in ({"subset": "sample-100BT"}, {"tokens": 500}, {"validation_fraction": 0.3}):
        other = dataclasses.replace(asked, **changes)
        assert find_prepared(other) is None
        with pytest.raises(ValueError, match="no route"):
            prepare_folder(other)


def test_ensure_prepared_refuses_what_is_incomplete(
    recipe_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(ensure_prepared(recipe_data).data)
    named = dataclasses.replace(recipe_data, data=str(folder))
    (folder / "manifest.json").rename("manifest.json")
    with pytest.raises(ValueError, match=r"texts-bytes holds shards and no manifest\.json"):
        ensure_prepared(named)
    folder.rename(staging_path(folder))
    with pytest.raises(ValueError, match="texts-bytes is not fully prepared: .*--shuffle-window"):
        ensure_prepared(named)
    Path("manifest.json").rename(staging_path(folder) / "manifest.json")
    for config in (named, recipe_data):  # training may begin with what is complete
        growing = dataclasses.replace(config, shuffle_window=1000)
        assert ensure_prepared(growing).data == str(folder)
    monkeypatch.setattr(prepare_module, "prepare_folder", lambda _: None)
    with pytest.raises(ValueError, match="texts-bytes is being prepared by Slurm"):
        ensure_prepared(recipe_data)
