"""Program: reads each file in a forked child with an audit hook, and prints one line of JSON for each.

Arguments: a valid file, a folder, `trusting` or `ours`, and the files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from overnight.conversion import safe_unpickle

WATCHED = ("os.", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.", "exec", "compile")


class GPTConfig:
    """Where build-nanogpt's files expect it: in `__main__`."""


def read_trusting(path: str, _folder: str) -> int:
    """As most programs do."""
    torch.load(path, map_location="cpu", weights_only=False)
    return 0


def watch(path: str, folder: str, read: Callable[[str, str], int]) -> dict[str, Any]:
    """The status, the output, and the audit events that running code causes."""
    events: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("exec", "compile"):  # importing a module executes the code of a .py file
            name = str(getattr(arguments[0], "co_filename", arguments[-1]))
            if name.endswith(".py") or name.startswith("<frozen"):
                return
        if event.startswith(WATCHED) and event not in ("os.listdir", "os.scandir"):
            events.add(f"{event} {arguments}"[:200])

    with open(folder + "/output", "w+") as sys.stdout:
        sys.addaudithook(hook)
        try:
            status: object = read(path, folder)
        except BaseException as error:
            status = type(error).__name__
        seen = sorted(events)
        sys.stdout.seek(0)
        return {"path": path, "status": status, "output": sys.stdout.read(), "events": seen}


def main(valid: str, folder: str, how: str, *paths: str) -> None:
    """Fork for each file, so that its limits and its hook end with it."""
    limit, safe_unpickle.limit_resources = safe_unpickle.limit_resources, lambda size: None
    assert safe_unpickle.convert_in_child(valid, folder) == 0  # lazy imports are done now
    safe_unpickle.limit_resources = limit
    for number, path in enumerate(paths):
        own = f"{folder}/{number}"
        os.mkdir(own)
        child = os.fork()
        if not child:
            read = read_trusting if how == "trusting" else safe_unpickle.convert_in_child
            result = watch(path, own, read)
            with open(own + "/result", "w") as file:
                json.dump(result, file)
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        result = {"path": path, "status": f"died {status}", "output": "", "events": []}
        if not status:
            with open(own + "/result") as file:
                result = json.load(file)
        sys.stdout.write(json.dumps({**result, "peak_bytes": used.ru_maxrss * 1024}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
