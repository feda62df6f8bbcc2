"""Limits on the package's layout that ruff and import-linter do not know; each has a negative control."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "overnight"
FILE_LINES, FUNCTION_LINES, LAZY_IMPORTS, READING_LINES = 400, 60, 40, 2400
READING_LIST = (
    *("recipe.py", "run/train.py", "run/setup.py", "training/step.py", "training/optim.py"),
    *("training/schedule.py", "training/batch.py", "model/gpt.py", "model/loss.py", "data/loader.py"),
    *("data/permutation.py", "training/checkpoint/"),
)
SHARED_NAMES = {"run", "main", "__init__", "command", "page"}
ENVIRONMENT_READERS = {f"distributed/{name}.py" for name in ("launcher", "world")} | {"files.py"}
# `--help`, `runs` and `report` start fast, because these (and every folder's __init__) need no torch.
TORCH_FREE = (
    r"(cli|config|recipe|files|run_directory|terminal|trackers|.*__init__"
    r"|(baselines|jobs|report|runs)/.*)\.py"
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PROBE = """
import importlib, sys
if sys.argv[1] == "torch-free":
    sys.modules["torch"] = None  # `import torch` raises ImportError
else:  # what importing these does is not ours to judge
    import filelock, numpy, rich.progress, safetensors.torch, tiktoken, tokenizers, torch, tyro
acts, ACTS = [], {"socket.connect", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"}
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
    acts.extend([(event, arguments[0])] * bool(event in ACTS or writes))
sys.addaudithook(watch)
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
    if acts:
        print(name, acts)
        acts.clear()
"""

Files = Mapping[str, str]
Rule = Callable[[Files], Iterator[str]]


def read_package() -> dict[str, str]:
    """Path below the package -> text, of every Python file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def check_sizes(files: Files) -> Iterator[str]:
    for path, text in files.items():
        if len(text.splitlines()) > FILE_LINES:
            yield f"{path} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
                yield f"{path}: {node.name} has more than {FUNCTION_LINES} lines"


def check_lazy_imports(files: Files) -> Iterator[str]:
    indented = re.compile(r"^ {4,}(?:import|from \S+ import) .*", re.MULTILINE)
    trees = {path: ast.unparse(ast.parse(text)) for path, text in files.items()}  # without TYPE_CHECKING's
    trees = {path: re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", text) for path, text in trees.items()}
    counts = {path: len(indented.findall(text)) for path, text in trees.items()}
    if sum(counts.values()) > LAZY_IMPORTS:
        yield f"{sum(counts.values())}: { {path: count for path, count in counts.items() if count} }"


def check_names(files: Files) -> Iterator[str]:
    """No file, public class or public function has the name of another."""
    found = defaultdict(list)
    for path, text in files.items():
        found[Path(path).stem, "file"].append(path)
        for node in ast.parse(text).body if path != "api.py" else ():  # its verbs are the commands' own
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                found[node.name, "definition"].append(path)
    for (name, _), paths in found.items():
        if len(paths) > 1 and name not in SHARED_NAMES:
            yield f"{name}: {' and '.join(paths)}"


def check_environment(files: Files) -> Iterator[str]:
    """Settings come from recipe and command line; a few files read what launchers and users export."""
    for path, text in files.items():
        if path not in ENVIRONMENT_READERS and re.search(
            r"\bos\.(environ|getenv|putenv)|os import .*env", text
        ):
            yield f"{path} reads or writes the environment"


RULES: list[tuple[Rule, Files]] = [
    (check_sizes, {"a.py": "def f():\n" + "    pass\n" * FUNCTION_LINES}),
    (check_sizes, {"a.py": "x = 1\n" * (FILE_LINES + 1)}),
    (check_lazy_imports, {"a.py": "def f():\n" + "    import os\n" * (LAZY_IMPORTS + 1)}),
    (check_names, {"a.py": "def load(): ...", "b.py": "class load: ..."}),
    (check_names, {"a/files.py": "", "b/files.py": ""}),
    (check_environment, {"a.py": "import os\nos.environ['X']"}),
]


@pytest.mark.parametrize("rule, negative_control", RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_package_keeps_rule(rule: Rule, negative_control: Files) -> None:
    assert list(rule(negative_control))
    found = list(rule(read_package()))
    assert not found, "\n" + "\n".join(found)


def test_reading_list_is_short_and_in_readme() -> None:
    """README promises that the core can be read in an hour."""
    read = [text for path, text in read_package().items() if path.startswith(READING_LIST)]
    assert len(read) > len(READING_LIST)
    assert sum(len(text.splitlines()) for text in read) <= READING_LINES
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    places = [readme.rfind(path) for path in READING_LIST]
    assert -1 not in places, f"README does not name {READING_LIST[places.index(-1)]}"
    assert places == sorted(places)


def test_import_contracts_catch_upward_import(tmp_path: Path) -> None:
    """Negative control of the contracts that `make check` runs."""
    shutil.copytree(PACKAGE, tmp_path / "src" / "overnight")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / "src/overnight/data/permutation.py").open("a") as file:
        file.write("import overnight.planning.estimate\n")
    program = (
        "import sys; sys.path[0] = 'src'; from importlinter.cli import lint_imports as run; sys.exit(run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "overnight.data.permutation -> overnight.planning.estimate" in done.stdout


@pytest.mark.parametrize(
    "kind, chosen, control",
    [("torch-free", TORCH_FREE, "import torch"), ("silent", ".*", "open('made', 'w')")],
)
def test_importing(kind: str, chosen: str, control: str, tmp_path: Path) -> None:
    """What must start fast needs no torch, and importing writes, connects and prints nothing."""
    (tmp_path / "control.py").write_text(control)
    paths = [path for path in read_package() if re.fullmatch(chosen, path) and path != "__main__.py"]
    modules = [
        ".".join(Path("overnight", path).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]
    for place, names, is_clean in ((PACKAGE.parent, modules, True), (tmp_path, ["control"], False)):
        words = ["-B", "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n{PROBE}", kind, *names]
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert bool(done.stdout + done.stderr) != is_clean, done.stdout + done.stderr
