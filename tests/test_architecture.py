"""The building code as a test: floors, sizes, names, imports that do nothing.

Each rule is a function from one parsed file to sentences, so that it can be tried on small files that
break it. CONTRIBUTING.md explains the floors; the list here is what holds.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

# From the ground up. A room is a module or a folder of the package; it imports rooms of lower floors only.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset(
        {"__init__", "cache", "hardware", "measurement", "run_directory", "settings", "terminal", "tracking"}
        | {"tensor_files", "watch", "world"}
    ),
    frozenset({"guard", "model", "loss", "optim", "ownership", "schedule", "sampling"}),
    frozenset({"text"}),
    frozenset({"batching", "data", "gradients", "state"}),
    frozenset(
        {"parallel", "checkpoint", "trainer", "decoding", "generate", "on_track", "processes", "sharding"}
    ),
    frozenset({"checks", "evaluation", "communication", "convert", "jobs", "memory", "report"}),
    frozenset({"stages"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
ENVIRONMENT_READERS = frozenset({"world", "cache"})
TORCH_FREE_ROOMS = frozenset(
    {
        "cache",
        "cli",
        "hardware",
        "jobs",
        "measurement",
        "on_track",
        "report",
        "run_directory",
        "settings",
        "terminal",
    }
    | {"guard", "tracking"}
)
FORBIDDEN_WORDS = frozenset(
    {"manager", "helper", "helpers", "handler", "util", "utils", "common", "base", "misc", "wrapper"}
    | {"processor", "v2"}
)
FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 700, 60, 6

PACKAGE = Path(__file__).parents[1] / "src" / "overnight"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Rule = Callable[["File"], Iterable[tuple[int, str]]]


@dataclass(frozen=True)
class File:
    """One parsed file of a package."""

    package: Path
    path: Path

    @property
    def module(self) -> str:
        """The dotted name, without `.__init__`."""
        parts = self.path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The module or folder directly below the package that this file belongs to."""
        return self.path.relative_to(self.package).with_suffix("").parts[0]

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.path.read_text(encoding="utf-8"))


def files_of(package: Path) -> list[File]:
    """Every Python file of a package, in order of its path."""
    return [File(package, path) for path in sorted(package.rglob("*.py"))]


def problems(files: Iterable[File], *rules: Rule) -> list[str]:
    """What the rules find, as `path:line: sentence`."""
    return [
        f"{file.path.relative_to(file.package.parent)}:{line}: {sentence}"
        for file in files
        for rule in rules
        for line, sentence in rule(file)
    ]


# ---------------------------------------------------------------- floors


def imported_modules(file: File) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, at any depth: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = file.module.split(".")
                keep = len(parents) - node.level + (file.path.name == "__init__.py")
                origin = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, arg.value) for arg in node.args if _is_text(arg))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def imported_rooms(file: File) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the file's own package."""
    rooms = {path.stem for path in file.package.iterdir() if path.suffix == ".py" or path.is_dir()}
    for line, name in imported_modules(file):
        package, *rest = name.split(".")
        if package == file.package.name:
            yield line, rest[0] if rest and rest[0] in rooms else "__init__"


def floor_of(room: str) -> int | None:
    """The room's floor, or None where it has none."""
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def imports_go_down(file: File) -> Iterator[tuple[int, str]]:
    """A room has a declared floor and imports only rooms of lower floors, its own files excepted."""
    here = floor_of(file.room)
    if here is None:
        yield 1, f"the room `{file.room}` stands on no floor; give it one in tests/test_architecture.py"
        return
    for line, room in imported_rooms(file):
        there = floor_of(room)
        if room in (file.room, "__init__") or there is None:
            continue
        if there >= here:
            yield line, f"`{file.room}` (floor {here}) imports `{room}` (floor {there})"


# ---------------------------------------------------------------- sizes


def stays_small(file: File) -> Iterator[tuple[int, str]]:
    """Files of 400 lines, functions of 60, six parameters. Ruff's C901 bounds the branching."""
    lines = len(file.path.read_text(encoding="utf-8").splitlines())
    if lines > FILE_LINES:
        yield 1, f"the file has {lines} lines; {FILE_LINES} are allowed"
    for node in ast.walk(file.tree):
        if not isinstance(node, FUNCTIONS):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield node.lineno, f"`{node.name}` has {length} lines; {FUNCTION_LINES} are allowed"
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in parameters if name not in ("self", "cls")])
        if count > PARAMETERS:
            yield (
                node.lineno,
                f"`{node.name}` takes {count} parameters; {PARAMETERS} are allowed, then a config",
            )


def limits_are_not_waived(file: File) -> Iterator[tuple[int, str]]:
    """No comment switches off the limits on branching and parameters, or a whole line's or file's checks."""
    waiver = re.compile(
        r"#\s*(ruff|flake8):\s*noqa|#\s*noqa(?!:)|#\s*noqa:.*(C901|PLR09)|#\s*mypy:|type: ignore(?!\[)"
    )
    for number, line in enumerate(file.path.read_text(encoding="utf-8").splitlines(), start=1):
        if waiver.search(line):
            yield number, f"a check is switched off: {line.strip()}"


# ---------------------------------------------------------------- names and state


def uses_no_global(file: File) -> Iterator[tuple[int, str]]:
    """No function rebinds a module's variable."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"`global {', '.join(node.names)}`: pass it in or return it"


def words(name: str) -> list[str]:
    """`HTTPServer_v2` -> http, server, v2."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)]


def names_say_what_they_mean(file: File) -> Iterator[tuple[int, str]]:
    """No module, class or function is called a Manager, a Helper, a Util."""
    defined = [(1, file.path.stem)] + [
        (node.lineno, node.name)
        for node in ast.walk(file.tree)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
    ]
    for line, name in defined:
        for word in FORBIDDEN_WORDS.intersection(words(name)):
            yield line, f"`{name}`: the word `{word}` says nothing; name what it is"


def environment_is_read_in_two_places(file: File) -> Iterator[tuple[int, str]]:
    """Settings come from the recipe and the command line; the environment is torchrun's and the cache's."""
    if file.room in ENVIRONMENT_READERS:
        return
    forbidden = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and node.attr in forbidden and ast.unparse(node.value) == "os":
            yield node.lineno, f"`os.{node.attr}`: only {', '.join(sorted(ENVIRONMENT_READERS))} may"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in forbidden:
                    yield node.lineno, f"`from os import {alias.name}`: only world and cache may"


RULES: tuple[Rule, ...] = (
    imports_go_down,
    stays_small,
    limits_are_not_waived,
    uses_no_global,
    names_say_what_they_mean,
    environment_is_read_in_two_places,
)


def test_the_package_keeps_the_building_code() -> None:
    found = problems(files_of(PACKAGE), *RULES)
    assert not found, "\n" + "\n".join(found)


def test_tests_and_tools_stay_readable() -> None:
    repository = PACKAGE.parents[1]
    paths = [path for name in ("tests", "tools", "benchmarks") for path in (repository / name).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    long = [
        f"{path.relative_to(repository)}: {n} lines" for path, n in lengths.items() if n > TEST_FILE_LINES
    ]
    assert not long, "\n" + "\n".join(long)


# ---------------------------------------------------------------- each rule, broken on purpose


def break_rule(folder: Path, **sources: str) -> list[File]:
    """A package of one-room files; `model__gpt` is model/gpt.py."""
    package = folder / "overnight"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in sources.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return files_of(package)


@pytest.mark.parametrize(
    ("source", "floor"),
    [
        ("import overnight.trainer", 4),
        ("from overnight import trainer", 4),
        ("from overnight.trainer import fit", 4),
        ("from .trainer import fit", 4),
        ("from . import trainer", 4),
        ("def f():\n    from overnight.trainer import fit", 4),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from overnight.trainer import fit", 4),
        ("import importlib\nimportlib.import_module('overnight.training.step')", 4),
        ("from overnight.optim import AdamW", 1),
    ],
)
def test_an_import_upwards_or_sideways_is_found(tmp_path: Path, source: str, floor: int) -> None:
    found = problems(break_rule(tmp_path, loss=source, trainer="", optim=""), imports_go_down)
    assert len(found) == 1
    line = len(source.splitlines())
    assert found[0].startswith(f"overnight/loss.py:{line}: `loss` (floor 1) imports ")
    assert found[0].endswith(f"(floor {floor})")


def test_an_import_downwards_or_at_home_is_not(tmp_path: Path) -> None:
    files = break_rule(
        tmp_path,
        trainer="from overnight.model.gpt import GPT\nfrom overnight import __version__",
        model__gpt="from overnight.model.config import ModelConfig\nfrom .config import PRESETS",
        model__config="from ..settings import to_toml",
        settings="import os.path",
    )
    assert problems(files, imports_go_down) == []


def test_a_room_without_a_floor_is_found(tmp_path: Path) -> None:
    assert "`attic` stands on no floor" in problems(break_rule(tmp_path, attic=""), imports_go_down)[0]


LONG_FUNCTION = "def f():\n" + "    pass\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    ("rule", "source", "sentence"),
    [
        (stays_small, "x = 1\n" * 401, "1: the file has 401 lines"),
        (stays_small, LONG_FUNCTION, "1: `f` has 61 lines"),
        (stays_small, "class C:\n    def f(self, a, b, c, d, e, f, *, g): ...", "2: `f` takes 7 parameters"),
        (limits_are_not_waived, "x = 1  # noqa", "1: a check is switched off"),
        (limits_are_not_waived, "def f(): ...  # noqa: C901", "1: a check is switched off"),
        (limits_are_not_waived, "x = 1  # type: ignore", "1: a check is switched off"),
        (uses_no_global, "def f():\n    global count\n    count = 1", "2: `global count`"),
        (names_say_what_they_mean, "class RunManager: ...", "1: `RunManager`: the word `manager`"),
        (names_say_what_they_mean, "def load_v2(): ...", "1: `load_v2`: the word `v2`"),
        (environment_is_read_in_two_places, "import os\nos.environ['X']", "2: `os.environ`"),
        (environment_is_read_in_two_places, "import os\nos.getenv('X')", "2: `os.getenv`"),
        (environment_is_read_in_two_places, "from os import environ", "1: `from os import environ`"),
    ],
)
def test_each_rule_finds_what_breaks_it(tmp_path: Path, rule: Rule, source: str, sentence: str) -> None:
    found = problems(break_rule(tmp_path, loss=source), rule)
    assert len(found) == 1
    assert found[0].startswith(f"overnight/loss.py:{sentence}")


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * 400,
        "def f():\n" + "    pass\n" * (FUNCTION_LINES - 1),
        "class C:\n    def f(self, a, b, c, d, e, f): ...",
        "x = 1  # type: ignore[arg-type]",
        "def based_on(baseline): ...",
    ],
)
def test_no_rule_finds_what_keeps_it(tmp_path: Path, source: str) -> None:
    assert problems(break_rule(tmp_path, loss=source), *RULES) == []


# ---------------------------------------------------------------- imports that do nothing

# Runs in a process of its own: argv[1] is `torch-free` or `silent`, the rest the modules to import.
PROBE = """
import importlib, sys, traceback

# What importing these does is not ours to judge.
if sys.argv[1] == "silent":
    import numpy, safetensors.torch, tiktoken, tokenizers, torch, tyro, rich.progress, filelock
else:
    sys.modules["torch"] = None  # `import torch` raises ImportError

acts = []
NOISY = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"}

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    if event in NOISY or writes:
        acts.append(f"{event} {arguments[0]}")

sys.addaudithook(watch)
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
    if acts:
        print(f"{name}: importing it does something: {acts}")
        acts.clear()
"""


def probe(kind: str, modules: Iterable[str], folder: Path) -> list[str]:
    """What a fresh process prints while it imports the modules found in `folder`: one line per offence."""
    process = subprocess.run(
        [
            sys.executable,
            "-B",
            "-c",
            f"import sys; sys.path.insert(0, {str(folder)!r})\n{PROBE}",
            kind,
            *modules,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return (process.stdout + process.stderr).splitlines()


def must_be_torch_free(file: File) -> bool:
    """Whether `--help`, `runs` or `report` needs it: it holds a config, or lies in a torch-free room."""
    configs = [n for n in ast.walk(file.tree) if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
    return bool(configs) or file.room in TORCH_FREE_ROOMS


def test_configs_and_reports_need_no_torch() -> None:
    modules = [file.module for file in files_of(PACKAGE) if must_be_torch_free(file)]
    assert "overnight.model.model_config" in modules
    found = probe("torch-free", modules, PACKAGE.parent)
    assert not found, "\n" + "\n".join(found)


def test_importing_does_nothing() -> None:
    modules = [file.module for file in files_of(PACKAGE) if file.room != "__main__"]
    found = probe("silent", modules, PACKAGE.parent)
    assert not found, "\n" + "\n".join(found)


def test_a_config_beside_torch_is_found(tmp_path: Path) -> None:
    files = break_rule(
        tmp_path,
        loss="import torch\nclass LossConfig: ...",
        optim="class AdamConfig: ...",
        sampling="import torch",
    )
    modules = [file.module for file in files if must_be_torch_free(file)]
    assert modules == ["overnight.model.loss", "overnight.training.optim"]
    found = probe("torch-free", modules, tmp_path)
    assert len(found) == 1
    assert found[0].startswith("overnight.model.loss: ")


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("print('hello')", "hello"),
        ("import os\nos.makedirs('made')", "importing it does something: ['os.mkdir made"),
        ("open('written', 'w').close()", "importing it does something: ['open written"),
        ("import subprocess\nsubprocess.run(['true'])", "importing it does something: ['subprocess.Popen"),
    ],
)
def test_an_import_that_acts_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, offence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    break_rule(tmp_path, loss=source)
    assert any(offence in line for line in probe("torch-free", ["overnight.model.loss"], tmp_path))
