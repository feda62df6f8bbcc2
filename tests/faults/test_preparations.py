"""The campaign's part about preparation in its quick form, which takes longer than the others'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="descriptors get their names from /proc")
def test_a_few_kills_commands_and_surroundings(repository: Path, tmp_path: Path) -> None:
    program = str(repository / "benchmarks" / "faults.py")
    done = subprocess.run(
        [sys.executable, program, "--quick", "--json", "--parts", "preparation"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["title"].startswith("D4-D6: ")
    assert found["measured"]["sha256"][:16] in found["notes"][0]
