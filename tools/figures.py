"""Put the tables of a campaign or a benchmark into a document, each in its place.

    python tools/figures.py docs/reliability.md FOLDER --command "make faults"

FOLDER holds PART.md for each part, as `--figures FOLDER` of tests/campaigns/faults.py and
benchmarks/distributed.py writes it. The place of a part in the document lies between
`<!-- figures: PART -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def put(document: str, part: str, figures: str) -> str:
    """The document with `figures` in the place of `part`. Raises ValueError if it has no such place."""
    begin, end = f"<!-- figures: {part} -->", "<!-- end of figures -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found, count = pattern.subn(lambda _: f"{begin}\n\n{figures}\n\n{end}", document)
    if count != 1:
        raise ValueError(f"the document has no place for {part}: add the lines {begin} and {end}")
    return found


def find_commit() -> str:
    """The short hash of the checkout's commit; "and changes" follows if its code has been changed since."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    status = [*git, "status", "--porcelain", "src", "tests/campaigns", "benchmarks"]
    changed = subprocess.run(status, capture_output=True, text=True, check=False)
    return (commit.stdout.strip() or "unknown") + (" and changes" if changed.stdout else "")


def main(words: list[str] | None = None) -> int:
    """Rewrite the document; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="the command that measured the figures")
    options = parser.parse_args(words)
    document = options.document.read_text(encoding="utf-8")
    tables = sorted(options.folder.glob("*.md"))
    if not tables:
        sys.exit(f"{options.folder} has no tables: run {options.command} first")
    for table in tables:
        _, *paragraphs = table.read_text(encoding="utf-8").strip().split("\n\n")  # without its title
        source = f"Commit {find_commit()}; `{options.command}`."
        document = put(document, table.stem, "\n\n".join([*paragraphs, source]))
    options.document.write_text(document, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
