"""What becomes of a preparation that is killed again and again: every byte must be as it would have been.

    python benchmarks/killed.py --corpus FOLDER --bpe gpt2-bpe --kills 20

`overnight prepare` is started and killed (SIGKILL) after a random time, until it was killed so often; each
time the same command follows, and goes on. Whenever it completes, the folder is held against one that was
written in peace.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import Report, run_plainly

HEADINGS = ("what", "count")


def digest(folder: Path) -> str:
    """Of all names and contents below a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def measure(options: argparse.Namespace) -> Report:
    """Kill and go on. Raises ValueError if a folder differs."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "overnight", "prepare", str(options.corpus)]
        command += ["--tokenizer", str(options.bpe), "--out"]
        started_at = time.perf_counter()
        subprocess.run([*command, f"{place}/peace"], check=True, capture_output=True)
        seconds = time.perf_counter() - started_at
        expected = digest(Path(place, "peace"))
        kills = completed = 0
        out = Path(place, "killed")
        while kills < options.kills or not out.exists():
            process = subprocess.Popen(
                [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(draw.uniform(0, seconds) if kills < options.kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            if out.exists():
                completed += 1
                if digest(out) != expected:
                    raise ValueError(f"after {kills} kills the folder differs from one written in peace")
                if kills < options.kills:
                    shutil.rmtree(out)
    return Report(
        title="A preparation, killed at random",
        headings=HEADINGS,
        rows=[
            ["kills", str(kills)],
            ["folders completed", str(completed)],
            ["of them equal to the one written in peace, byte for byte", str(completed)],
        ],
        measured={"kills": kills, "completed": completed},
        settings={"seed": options.seed, "sha256": expected[:16]},
    )


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of text")
    parser.add_argument("--bpe", type=Path, required=True, help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: measure(chosen), as_json=chosen.json))
