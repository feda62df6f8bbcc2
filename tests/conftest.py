"""What every test shares: one thread per process, no network, and the folders of data that may be absent."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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

# Imported after the environment is set.
from overnight.data import DataConfig  # noqa: E402
from overnight.model.model_config import ModelConfig  # noqa: E402
from overnight.preparation import prepare  # noqa: E402
from overnight.preparation.prepare_config import PrepareConfig  # noqa: E402
from overnight.recipe import Recipe, with_settings  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
LINES = "".join(
    f"Line {number} of a small text about the number {number * 7 % 100}.\n" for number in range(60)
)
SMALL_TEXTS = [LINES[number * 37 : number * 37 + 150] for number in range(40)]


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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


@pytest.fixture(scope="session")
def prepare_texts() -> Callable[..., Path]:
    """`prepare_texts(folder, texts, **settings)`: the shards of these texts, a file each, in folder/shards.

    In characters. Without other texts: 40 documents, about 5,000 training tokens, in several shards.
    """

    def build(folder: Path, texts: Iterable[str] = SMALL_TEXTS, **settings: Any) -> Path:
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text)
        asked = {"tokenizer": "characters", "validation_fraction": 0.2, "shard_tokens": 1500} | settings
        prepare.prepare_shards(PrepareConfig(source=str(folder), out=str(folder / "shards"), **asked))
        return folder / "shards"

    return build


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """`small_recipe(shards, **settings)`: 12 steps of a small model with dropout, on the CPU in float32."""

    def build(shards: Path, **settings: Any) -> Recipe:
        model = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=0.1)
        small = Recipe(run_name="small", data=DataConfig(data=str(shards)), model=model)
        usual = {"device": "cpu", "precision": "fp32", "compile": False}
        usual |= {"total_steps": 12, "warmup_steps": 3, "sample_tokens": 8}
        return with_settings(small, **usual | settings)

    return build


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


Text = Callable[[int], str]


@pytest.fixture
def config_of_waves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Text], PrepareConfig]:
    """`config_of_waves(text)`: 600 documents, `text(number)` each, whose shards are published in waves."""

    def write(text: Text) -> PrepareConfig:
        (tmp_path / "texts").mkdir()
        for number in range(20):
            documents = map(text, range(number * 30, number * 30 + 30))
            content = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            (tmp_path / "texts" / f"{number:02}.jsonl").write_text(content)
        monkeypatch.setattr(prepare, "UNIT_BYTES", 2000)
        monkeypatch.setattr(prepare, "EARLY_BYTES", 12_000)
        paths = {"source": str(tmp_path / "texts"), "out": str(tmp_path / "shards")}
        return PrepareConfig(
            **paths, tokenizer="characters", validation_fraction=0.2, shard_tokens=1500, workers=1
        )

    return write


@pytest.fixture
def after_each_wave(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """`after_each_wave(act)`: preparations call it whenever they have published shards."""
    show = prepare.show_so_far

    def install(act: Callable[[], object]) -> None:
        monkeypatch.setattr(prepare, "show_so_far", lambda *given: (show(*given), act()))

    return install
