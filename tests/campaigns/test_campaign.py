"""The fault campaign: a few trials of each kind in a plain run; every part in full with `-m campaign`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FULL = (
    *("stops", "rows", "kills", "crashes", "resumes", "errors", "corruption", "record", "fallback"),
    *("environments", "parents"),
    *("background", "starts", "signals", "preparation", "leaks", "input"),
)
QUICK = [
    "corruption",
    "record",
    "fallback",
    "crashes",
    "errors",
    "background",
    "starts",
    "signals",
    "environments",
    "input",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors get their names from /proc")


def run_parts(folder: Path, figures: Path, *words: str) -> str:
    """Standard output of tests/campaigns/faults.py, which has ended with status 0."""
    command = [sys.executable, str(HERE / "faults.py"), "--figures", str(figures), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_table(path: Path) -> None:
    """The part caught each of its mutants at least once."""
    controls = re.findall(r"control.*?\| +(\d[\d,]*)", path.read_text())
    assert controls, path.read_text()
    assert "0" not in controls


def test_quick_campaign(tmp_path: Path) -> None:
    """All parts in one process, because starting one takes as long as a dozen trials."""
    run_parts(tmp_path, tmp_path, "--quick", "--parts", *QUICK)
    assert {path.stem for path in tmp_path.glob("*.md")} == set(QUICK)
    for part in QUICK:
        check_table(tmp_path / f"{part}.md")


@pytest.mark.slow
def test_quick_campaign_of_preparation(tmp_path: Path) -> None:
    found = json.loads(run_parts(tmp_path, tmp_path, "--quick", "--json", "--parts", "preparation"))
    assert found["measured"]["sha256"][:16] in found["notes"][0]


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", FULL)
def test_campaign_in_full(part: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """`make faults`; tools/figures.py writes what is left in the cache into docs/reliability.md."""
    assert pytestconfig.cache is not None
    figures = pytestconfig.cache.mkdir("figures")
    run_parts(tmp_path, figures, "--parts", part)
    check_table(figures / f"{part}.md")


def test_every_part_runs_in_full(programs: dict[str, Any]) -> None:
    assert set(FULL) == set(programs["faults"].PARTS)


def test_mutants_name_what_exists(programs: dict[str, Any]) -> None:
    """A target that was renamed would make its negative control fail only in the full campaign."""
    sources = "".join(path.read_text() for path in HERE.glob("f*.py"))
    targets = set(re.findall(r'"(overnight\.[a-z_.]+:[A-Za-z_.]+)"', sources))
    assert len(targets) > 30
    for target in targets:
        assert programs["mutants"].original(target) is not None
    with pytest.raises(AttributeError, match="does not exist"):
        programs["mutants"].original("overnight.run.train:" + "nothing")
