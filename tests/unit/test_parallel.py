from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from overnight import parallel
from overnight.parallel import ComputeConfig, can_compile, resolve_compute


def test_what_is_left_open_is_decided_and_what_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(parallel, "can_compile", lambda: True)
    decided = resolve_compute(ComputeConfig(), "cpu")
    assert (decided.device, decided.precision, decided.compile) == ("cpu", "bf16", True)
    given = ComputeConfig(precision="fp32", compile=False, attention="plain")
    kept = resolve_compute(given, "cpu")
    assert (kept.precision, kept.compile, kept.attention) == ("fp32", False, "plain")
    assert resolve_compute(ComputeConfig(), "mps").compile is False


def test_compiling_needs_a_compiler_and_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not can_compile()
    (tmp_path / "Python.h").touch()
    assert can_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile()
