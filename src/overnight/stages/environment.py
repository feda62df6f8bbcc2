"""What a run ran on, written down before it begins."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from typing import Any

from overnight import __version__
from overnight.hardware import find_device_name
from overnight.parallel import ComputeConfig


def describe_environment(compute: ComputeConfig, parameters: int) -> dict[str, Any]:
    """Versions, hardware, precision, commit and command of this process, for environment.json."""
    import torch

    assert compute.device is not None
    return {
        "overnight": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": compute.device,
        "device_name": find_device_name(compute.device),
        "precision": compute.precision,
        "compiled": compute.compile,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": " ".join(["overnight", *sys.argv[1:]]),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "parameters": parameters,
    }


def _git_commit() -> str | None:
    """The commit of the folder the command was typed in; None outside a repository, or without git."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
