"""A small corpus in many scripts, the command that makes shards of it, and what must be left in the end."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

from mutants import replace

SYLLABLES = (
    ("the", "wa", "ter", "ing", "lo", "ro", "meo", "'s", "st", "ock"),
    ("ğı", "İs", "tan", "ül", "ör", "ış", "çe", "kır", "şe", "Iı"),
    ("über", "ße", "Ä", "gen", "lich", "Öl", "e\u0301", "n\u0303"),
    ("во", "да", "ж", "ив", "ёт", "Щи", "кра", "ть"),
    ("λό", "γος", "Σί", "συ", "φος", "ώ"),
    ("中", "文", "語", "日", "本", "の", "한", "국"),
    ("سلا", "م", "كتا", "ب", "ال", "ع"),
    ("🙂", "👩‍👩‍👧", "1", "99", "<|endoftext|>", "²", "\u2028", "\x85"),
)
NAMES = (
    *("10.txt", "9.txt", "Zebra.md", "apfel.txt", "Äpfel.txt", "İnek.md", "ırmak.txt", "index.jsonl"),
    *("teil/b.jsonl", "teil/B.jsonl.gz", "teil/ä.txt", "中/文.txt", "part-2.txt", "part_10.jsonl"),
)
TEXTS = "Texte-中"
OUT = Path("out/shards")
LOCK = ".shards.lock"
UNIT_BYTES, EARLY_BYTES = 60_000, 100_000
SHARD_TOKENS = 30_000


def make_corpus(folder: Path, seed: int, text_bytes: int = 400_000) -> Path:
    """Files of every kind that needs no library, of about so many bytes; some documents twice, some empty."""
    draw = random.Random(seed)
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = _draw_texts(draw, text_bytes // len(NAMES))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        plain = "\n\n".join(texts)
        content = (lines if ".jsonl" in name else plain).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return folder


def _draw_texts(draw: random.Random, text_bytes: int) -> list[str]:
    texts, held = ["", "the same words in every file"], 0
    while held < text_bytes:
        syllables = draw.choice(SYLLABLES)
        words = ("".join(draw.choices(syllables, k=draw.randrange(1, 4))) for _ in range(draw.randrange(200)))
        texts.append(" ".join(words) + draw.choice(("", "\n", ".\r\n")))
        held += len(texts[-1].encode())
    return texts


def command(corpus: Path | str, *more: str) -> list[str]:
    """What is typed: a BPE is trained, several shards are written to `OUT`."""
    return [
        *(
            "prepare",
            str(corpus),
            "--out",
            str(OUT),
            "--tokenizer",
            "bpe-400",
            "--validation-fraction",
            "0.1",
        ),
        *("--shard-tokens", str(SHARD_TOKENS), *(more or ("--workers", "2"))),
    ]


def small_units() -> None:
    """In a new process: the source is cut small, so that little text goes the ways of much."""
    replace("overnight.preparation.prepare:UNIT_BYTES", UNIT_BYTES)
    replace("overnight.preparation.prepare:EARLY_BYTES", EARLY_BYTES)


def digest(folder: Path) -> str:
    """Of all names and contents below a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def find_wrong(out: Path, expected: str) -> str | None:
    """How a finished folder, or what lies beside it, is not as undisturbed; None if it is."""
    if digest(out) != expected:
        return "the folder differs from one written undisturbed"
    beside = {path.name for path in out.parent.iterdir()} - {out.name, f".{out.name}.lock"}
    return f"left beside the folder: {', '.join(sorted(beside))}" if beside else None
