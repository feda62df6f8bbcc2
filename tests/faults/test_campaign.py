"""The campaign of benchmarks/faults.py in its quick form: a few trials of each kind, each control caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ["corruption", "fallback", "crashes", "errors", "background", "starts", "signals", "environments"]


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors get their names from /proc")
def test_a_few_trials_of_each_kind(repository: Path, tmp_path: Path) -> None:
    """All parts in one process, whose start takes as long as a dozen trials."""
    (tmp_path / "page.md").write_text(
        "".join(f"<!-- figures: {part} -->\n<!-- end of figures -->\n" for part in PARTS)
    )
    command = [sys.executable, str(repository / "benchmarks" / "faults.py"), "--quick", "--json"]
    done = subprocess.run(
        [*command, "--write", str(tmp_path / "page.md"), "--parts", *PARTS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    titles = [line.split('"')[3] for line in done.stdout.splitlines() if line.startswith('  "title"')]
    wanted = ["C4", "C5", "C1", "C3", "C7", "C9", "S1", "C10"]
    assert [title.partition(":")[0] for title in titles] == wanted
    page = (tmp_path / "page.md").read_text()
    assert page.count("control, a mutant") >= len(PARTS)
    assert page.count("Commit ") == len(PARTS)
