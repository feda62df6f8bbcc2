"""Print constraints.txt: the exact versions of everything `overnight[dev]` needs, as they are installed.

Only names and versions, sorted: no addresses, and no local label such as torch's `+cpu`, so that every index
can serve it.
"""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(root: str) -> dict[str, str]:
    """Name -> version of a requirement and all it needs, without the root itself."""
    versions: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [Requirement(root)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if f"{name}[{extra}]" in seen:
                continue
            seen.add(f"{name}[{extra}]")
            installed = distribution(name)
            versions[name] = installed.version.partition("+")[0]
            for line in installed.requires or []:
                child = Requirement(line)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    waiting.append(child)
    del versions[canonicalize_name(Requirement(root).name)]
    return versions


if __name__ == "__main__":
    for name, version in sorted(needed("overnight[dev]").items()):
        print(f"{name}=={version}")
