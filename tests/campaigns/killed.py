"""What becomes of a preparation that is killed again and again: every byte must be as it would have been.

    python tests/campaigns/killed.py --corpus FOLDER --bpe gpt2-bpe --kills 20

`overnight prepare` is started and killed (SIGKILL) after a random time, until it was killed so often; each
time the same command follows, and goes on. Whenever it completes, the folder is held against one that was
written undisturbed. This is the form for a real corpus; `faults.py --parts preparation` makes a small one,
and tries every change of the disk, many commands at once and other surroundings as well.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults_corpus import digest, find_wrong
from report import Report, run_plainly

HEADINGS = ("what", "count")


def measure(options: argparse.Namespace) -> Report:
    """Kill and go on. Raises ValueError if a folder differs, or something is left beside it."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "overnight", "prepare", str(options.corpus)]
        command += ["--tokenizer", str(options.bpe), "--out"]
        started_at = time.perf_counter()
        subprocess.run([*command, f"{place}/in/peace"], check=True, capture_output=True)
        seconds = time.perf_counter() - started_at
        expected = digest(Path(place, "in", "peace"))
        kills = completed = 0
        out = Path(place, "out", "killed")
        while kills < options.kills or not out.exists():
            kills += kill_after(
                [*command, str(out)], draw.uniform(0, seconds) if kills < options.kills else None
            )
            if out.exists():
                completed += 1
                if wrong := find_wrong(out, expected):
                    raise ValueError(f"after {kills} kills: {wrong}")
                if kills < options.kills:
                    shutil.rmtree(out)
    return Report(
        title="A preparation, killed at random",
        headings=HEADINGS,
        rows=[
            ["kills", str(kills)],
            ["folders completed", str(completed)],
            ["of them equal to the one written undisturbed, byte for byte", str(completed)],
        ],
        measured={"kills": kills, "completed": completed},
        settings={"seed": options.seed, "sha256": expected[:16]},
    )


def kill_after(command: Sequence[str], seconds: float | None) -> bool:
    """True if the command was killed, since it was not done after so many seconds.

    Raises ValueError if it ends in another way.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if status := process.wait(seconds):
            raise ValueError(f"the command ended with status {status}: {' '.join(command)}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


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
