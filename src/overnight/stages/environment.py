"""What a run runs on, written down before it begins, and again each time it goes on."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overnight import __version__
from overnight.hardware import find_device_name
from overnight.parallel import ComputeConfig

ABOUT_EACH_START = {"started_at", "command"}


def describe_environment(
    compute: ComputeConfig, parameters: int, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Versions, hardware, precision, commit and command of this process, for environment.json.

    Of a run that goes on, `before` is what that file says: it stays, and its list "resumed" grows by
    when and by which command the run went on, and whatever else is not as it was at first.
    """
    import torch

    assert compute.device is not None
    facts = {
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
        "command": shlex.join(["overnight", *sys.argv[1:]]),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "parameters": parameters,
    }
    if before is None:
        return facts
    again = {
        name: fact for name, fact in facts.items() if name in ABOUT_EACH_START or before.get(name) != fact
    }
    return {**before, "resumed": [*before.get("resumed", []), again]}


def _git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit that `file`, this package's own, belongs to; None if it is in none, or without git.

    An installed package often lies inside somebody else's repository, whose commit says nothing about it.
    """
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD", f"HEAD:./{file.name}"],  # fails if the commit has no such file
            cwd=file.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split()[0]
