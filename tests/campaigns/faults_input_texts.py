"""Files of text, shards and prompts, drawn at random and damaged; and what reference programs read."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from faults_input_trials import Outcome, Trial, damage
from faults_trials import DONE

PIECES = (
    *(
        "zebra ",
        "naïve ",
        "中文",
        "🙂",
        "1,024 ",
        "\u2028",
        "e\u0301",
        "the fox ",
        "don't ",
        "  two",
        "x" * 40,
    ),
    *(
        "\t",
        "\n",
        "\r\n",
        "\r",
        "\n\n",
        "\\",
        '"',
        "\u00a0",
        "\ufeff",
        "\u0085",
        "\x1c",
        "\x7f",
        "</s>",
        "{}",
    ),
)
HEADER_WORDS = 256


def draw_document(draw: random.Random) -> str:
    """A text of many scripts, now and then empty."""
    return "".join(draw.choices(PIECES, k=draw.choice((0, 1, 5, 20, 60))))


# ---------------------------------------------------------------- texts

ODD_LINES = (
    '{"text": "\\ud800 half"}', '{"text": "\\ud83d\\ude42 whole"}', '{"text": null}', '{"text": 7}',
    '{"text": ["a"]}',
    '{"other": "x"}', "[]", "null", "7", '"text"', '{"text": "twice", "text": "last"}', "{'text': 'x'}",
    '{"text": "number", "n": ' + "9" * 5000 + "}", '{"text": "nan", "n": NaN}',
    '{"text": "deep", "n": ' + "[" * 3000 + "]" * 3000 + "}",
    '{"text": "a\tb"}', '{"text": "a\\u0000b"}', '{"text": "x"} {"text": "y"}',
    '{"text": "x"},', "{}", '{"text": ""}',
    '\u2028{"text": "after"}', '{"text": "exp", "n": 1e999}', '  {"text": "blank"}  ',
    '\x0c{"text": "feed"}', '{"Text": "x"}',
)  # fmt: skip


def write_lines(documents: Sequence[str], draw: random.Random) -> bytes:
    """JSON lines as programs write them, with an odd one now and then."""
    lines = [json.dumps({"n": 1, "text": each}, ensure_ascii=draw.random() < 0.5) for each in documents]
    if draw.random() < 0.3:
        lines.insert(draw.randrange(len(lines)), draw.choice(ODD_LINES))
    end = draw.choice(("\n", "\n", "\r\n", "\n\n"))
    return (end.join(lines) + end * draw.randrange(2)).encode("utf-8", "surrogatepass")


def write_array(documents: Sequence[str], draw: random.Random) -> bytes:
    """A JSON array, in one line or in many."""
    items = [json.dumps({"text": each}) for each in documents]
    if draw.random() < 0.3:
        items.insert(draw.randrange(len(items)), draw.choice(ODD_LINES))
    return (
        draw.choice(("[%s]", " [\n%s\n]\n", "\n\n[%s]")) % draw.choice((",", ",\n", " , ")).join(items)
    ).encode()


def write_parquet(documents: Sequence[str], draw: random.Random) -> bytes:
    """A Parquet file, of one of the types and compressions in which text is stored."""
    kind = draw.choice(
        (
            pyarrow.string(),
            pyarrow.large_string(),
            pyarrow.binary(),
            pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        )
    )
    values: list[Any] = [None if draw.random() < 0.02 else each for each in documents]
    if kind == pyarrow.binary():
        values = [each and each.encode() for each in values]
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(values))), "text": pyarrow.array(values, kind)})
    parquet.write_table(
        table, file, compression=draw.choice(("snappy", "gzip", "zstd", "none")), row_group_size=7
    )
    return file.getvalue()


def write_text(documents: Sequence[str], _draw: random.Random) -> bytes:
    return "\n".join(documents).encode()[:19_000]


WRITERS: dict[str, Callable[[Sequence[str], random.Random], bytes]] = {
    ".jsonl": write_lines, ".json": write_array, ".txt": write_text, ".parquet": write_parquet,
}  # fmt: skip


class UnreadableError(Exception):
    """The reference does not read this."""


def unpack(name: str, data: bytes) -> bytes:
    """Without its compression."""
    try:
        if name.endswith(".gz"):
            return gzip.decompress(data)
        if name.endswith(".zst"):
            return pyarrow.CompressedInputStream(io.BytesIO(data), "zstd").read()
    except Exception as error:
        raise UnreadableError(name) from error
    return data


def read_texts(name: str, data: bytes, on_bad_text: str) -> set[str]:
    """The documents by json and pyarrow. Raises UnreadableError where a document is to be refused."""
    data = unpack(name, data)
    if ".parquet" in name:
        return {text for text in _read_parquet(data) if text is not None or _refuse(on_bad_text)} - {None, ""}
    data = data.removeprefix(b"\xef\xbb\xbf")
    if ".txt" in name:
        return {_decode(data, on_bad_text)} - {""}
    if ".json" in name and ".jsonl" not in name and data.lstrip().startswith(b"["):
        try:
            items = json.loads(data.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UnreadableError(name) from error
        return {_text_of(item, on_bad_text) for item in items} - {""}
    found = set()
    for line in data.split(b"\n"):
        if line.strip():
            text = _decode(line, on_bad_text)
            try:
                fields = json.loads(text) if text else None
            except (ValueError, RecursionError):
                fields = None
            found.add(_text_of(fields, on_bad_text))
    return found - {""}


def _read_parquet(data: bytes) -> list[str | None]:
    try:
        values = parquet.read_table(io.BytesIO(data), columns=["text"]).column(0).to_pylist()
        return [each.decode() if isinstance(each, bytes) else each for each in values]
    except Exception as error:
        raise UnreadableError("parquet") from error


def _refuse(on_bad_text: str) -> bool:
    if on_bad_text == "fail":
        raise UnreadableError("a bad text")
    return False


def _decode(data: bytes, on_bad_text: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        _refuse(on_bad_text)
        return data.decode(errors="replace") if on_bad_text == "replace" else ""


def _text_of(fields: Any, on_bad_text: str) -> str:
    if not isinstance(fields, dict):
        return "" if not _refuse(on_bad_text) else ""
    if "text" not in fields:
        raise UnreadableError("no column")
    text = fields["text"]
    if not isinstance(text, str):
        return "" if not _refuse(on_bad_text) else ""
    if any("\ud800" <= each <= "\udfff" for each in text):
        _refuse(on_bad_text)
        if on_bad_text == "skip":
            return ""
        text = "".join("\ufffd" if "\ud800" <= each <= "\udfff" else each for each in text)
    return text


def read_shards(folder: Path) -> list[list[int]]:
    """The documents' ids in a folder of shards, by numpy."""
    end = json.loads((folder / "manifest.json").read_text())["end_of_text"]
    found: list[list[int]] = []
    for path in sorted(folder.glob("*.bin")):
        head = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
        ids = np.fromfile(path, dtype="<u2" if head[0] == 20240520 else "<u4", offset=4 * HEADER_WORDS)
        assert len(ids) == head[2], path
        places = np.flatnonzero(ids == end)
        found += [part[part != end].tolist() for part in np.split(ids, places)]
    return [each for each in found if each]


def spell_characters(folder: Path, ids: list[int]) -> str:
    """The text of ids, by the vocabulary in tokenizer.json."""
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    spelled = {
        number: bytes([int(each[3:5], 16)]) if len(each) == 6 else each.encode()
        for each, number in vocabulary.items()
    }
    return b"".join(spelled[each] for each in ids).decode()


def draw_texts(draw: random.Random) -> Trial:
    """A file of text becomes shards: its documents are those that json, gzip, zstandard and pyarrow read."""
    documents = [f"{number} {draw_document(draw)}" for number in range(draw.choice((12, 30, 60)))]
    kind = draw.choice(sorted(WRITERS))
    data = WRITERS[kind](documents, draw)
    packed = "" if kind == ".parquet" else draw.choice(("", "", ".gz", ".zst"))
    before, after = draw.random() < 0.3, draw.random() < 0.15
    data = damage(data, draw) if before else data
    if packed == ".gz":
        data = gzip.compress(data, mtime=0)
    elif packed == ".zst":
        data = pyarrow.compress(data, "zstd", asbytes=True)
    data = damage(data, draw) if after else data
    name, on_bad_text = f"source{kind}{packed}", draw.choice(("fail", "fail", "replace", "skip"))
    return trial_of_texts(name, data, on_bad_text, may_refuse=after)


def trial_of_texts(name: str, data: bytes, on_bad_text: str, *, may_refuse: bool = False) -> Trial:
    """A file of text is prepared."""
    options = f"--workers 1 --validation-fraction 0.3 --on-bad-text {on_bad_text}"
    words = f"prepare {name} --tokenizer characters --out new {options}"

    def judge(folder: Path, outcome: Outcome) -> str | None:
        try:
            expected = read_texts(name, data, on_bad_text)
        except UnreadableError as error:
            if on_bad_text != "fail" and ".json" in name:
                return None  # an array is read up to its damage
            return (
                f"difference: read, though the reference refuses it: {error}"
                if outcome.status == DONE
                else None
            )
        if outcome.status != DONE:
            is_short = len(expected) < 8
            return None if is_short or may_refuse else f"refused: {outcome.said[-300:]}"
        found = {spell_characters(folder / "new", ids) for ids in read_shards(folder / "new")}
        wrong = [*(expected - found), *(found - expected)]
        return f"difference: {len(expected)} texts, {len(found)} read; {wrong[0][:80]!r}" if wrong else None

    return Trial(tuple(words.split()), lambda folder: (folder / name).write_bytes(data) and None, judge)


# ---------------------------------------------------------------- shards of other programs


def write_ids(program: str, ids: np.ndarray[Any, Any], split: str, draw: random.Random) -> tuple[str, bytes]:
    """(name, bytes) of a file of ids as a program writes it."""
    if program == "plain":
        return f"{split}.bin", ids.tobytes()
    if program == "npy":
        file = io.BytesIO()
        np.save(file, ids if draw.random() < 0.9 else ids.reshape(2, -1))
        return f"{split}_000001.npy", file.getvalue()
    head = np.zeros(HEADER_WORDS, "<i4")
    head[:3] = (20240520, 1, len(ids)) if ids.itemsize == 2 else (20240801, 7, len(ids))
    return f"gpt_{split}_000001.bin", head.tobytes() + ids.tobytes()


def draw_shards(draw: random.Random) -> Trial:
    """Arrays of ids of other programs are adopted: the ids are those that numpy reads."""
    rng = np.random.default_rng(draw.randrange(2**32))
    program = draw.choice(("plain", "plain", "npy", "headed"))
    kinds = ("<u2", "<u4", "<i8", ">u2", "<i4", "<f4", "|u1")
    kind = np.dtype(draw.choice(kinds[:2] if draw.random() < 0.6 else kinds))
    most = draw.choice((299, 299, 299, 255, 400, 70_000))
    highest = min(most, np.iinfo(kind).max if kind.kind in "ui" else most)
    files = dict(
        write_ids(program, rng.integers(0, highest, 3000).astype(kind), split, draw)
        for split in ("train", "val")
    )
    is_damaged = draw.random() < 0.4
    if is_damaged:
        name = draw.choice(sorted(files))
        files[name] = damage(files[name], draw)
    is_plain = not is_damaged and kind in (np.dtype("<u2"), np.dtype("<u4")) and most < 300
    words = "prepare --from-shards source --tokenizer shards/tokenizer --out new"

    def arrange(folder: Path) -> None:
        (folder / "source").mkdir()
        for name, data in files.items():
            (folder / "source" / name).write_bytes(data)

    def judge(folder: Path, outcome: Outcome) -> str | None:
        if outcome.status != DONE:
            return f"refused: {outcome.said[-300:]}" if is_plain and program != "npy" else None
        for split, ours in (("train", "train"), ("val", "validation")):
            (data,) = (data for name, data in files.items() if split in name)
            if program == "plain" and len(data) % kind.itemsize:
                return f"difference: {split} of {kind} is read, though it ends within an id"
            expected = (
                np.load(io.BytesIO(data))
                if program == "npy"
                else np.frombuffer(data, kind, offset=program == "headed" and 1024)
            )
            path, found = folder / "new", []
            for shard in sorted(path.glob(f"{ours}-*.bin")):
                head = np.fromfile(shard, dtype="<i4", count=3)
                found.append(np.fromfile(shard, dtype="<u2" if head[0] == 20240520 else "<u4", offset=1024))
            if not np.array_equal(np.concatenate(found), expected):
                return f"difference: {split} of {program} {kind} has other ids"
        return None

    return Trial(tuple(words.split()), arrange, judge)


# ---------------------------------------------------------------- prompts


def draw_prompts(draw: random.Random) -> Trial:
    """A file of prompts: each line that Python's text files have, and that is not blank, is answered."""
    lines = [
        draw.choice(
            ("Line", " two", "é", "中", "-x", "--seed", "", " ", "\t", "{}", "\x1b[2J", "a\x0cb", "a\u2028b")
        )
        for _ in range(4)
    ]
    data = draw.choice(("\n", "\r\n", "\n\n", "\r")).join(lines).encode()
    if draw.random() < 0.5:
        data = damage(data, draw)
    words = "generate runs/small --prompt-file prompts --json --max-new-tokens 2 --device cpu"

    def judge(_folder: Path, outcome: Outcome) -> str | None:
        try:
            text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
        except UnicodeDecodeError:
            return "difference: read, though it is not UTF-8" if outcome.status == DONE else None
        expected = [line for line in text.split("\n") if line.strip()]
        if outcome.status != DONE:
            is_short = expected and max(map(len, expected)) < 8
            return f"refused: {outcome.said[-300:]}" if is_short else None
        found = [json.loads(line)["prompt"] for line in outcome.out.splitlines()]
        return None if found == expected else f"difference: prompts {found!r}, not {expected!r}"

    return Trial(tuple(words.split()), lambda folder: (folder / "prompts").write_bytes(data) and None, judge)
