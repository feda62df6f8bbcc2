"""What every test shares: one thread per process, no network, and the folders of data that may be absent."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Tests run in several processes at once; more threads than cores make them wait for each other.
# Set before torch is first imported, and inherited by every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# The same examples each time, and none fails because the machine is busy.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="rewrite the golden files of commands")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of corpora and benchmarks beside the checkout; the test is skipped where it is absent."""
    folder = (REPOSITORY / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip("../shared/data is not beside this checkout")
    return folder


class Programs(dict[str, Any]):
    """The modules of benchmarks/, tests/campaigns/ and tools/ by their names, imported on first use."""

    def __missing__(self, name: str) -> Any:
        self[name] = importlib.import_module(name)
        return self[name]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    """The programs outside the package, imported as if started in their folder; removed afterwards."""
    folders = [REPOSITORY / name for name in ("benchmarks", "tests/campaigns", "tools")]
    before = set(sys.modules)
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield Programs()
    for name in {path.stem for folder in folders for path in folder.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
