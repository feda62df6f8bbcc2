"""The loss curves of small recipes stay what they are, unless a commit says why (tools/golden.py --write)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from overnight.training import OptimizerConfig

ELSEWHERE = 1e-5  # relative, on another processor or torch


@pytest.fixture
def golden(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/golden.py."""
    monkeypatch.syspath_prepend(str(repository / "tools"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module("golden")


def read(golden: Any, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden.FOLDER / f"{name}.json").read_text())
    return content


@pytest.mark.parametrize("name", ["plain", "micro-batches", "wsd-chunked"])
def test_the_curve_is_what_it_was(golden: Any, tmp_path: Path, name: str) -> None:
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == {*golden.RECIPES}
    recorded = read(golden, name)
    losses = golden.train(name, tmp_path)
    if all(recorded[fact] == value for fact, value in golden.describe_class().items()):
        assert losses == recorded["losses"]
    assert losses == pytest.approx(recorded["losses"], rel=ELSEWHERE)
    assert losses[-1] < 0.8 * losses[0], "it learns"


def test_a_hair_off_is_seen(golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a learning rate that differs in its fourth place."""
    optimizer = OptimizerConfig(peak_learning_rate=1.0001e-2)
    monkeypatch.setitem(golden.RECIPES, "plain", {**golden.RECIPES["plain"], "optimizer": optimizer})
    recorded = read(golden, "plain")
    losses = golden.train("plain", tmp_path)
    assert losses != pytest.approx(recorded["losses"], rel=ELSEWHERE)
    assert losses[0] == pytest.approx(recorded["losses"][0], rel=ELSEWHERE)
