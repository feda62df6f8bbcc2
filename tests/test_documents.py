"""What the documents and settings files say is true: paths, links, commands, targets, versions."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from overnight import __version__, cli
from overnight.baselines.diagnoses import DIAGNOSES
from overnight.distributed.watchdog import FROZEN
from overnight.doctor.command import CHECKS
from overnight.evaluation.perplexity import LOGITS_AT_ONCE
from overnight.evaluation.scores import LEAST_EXAMPLES, RESAMPLES
from overnight.evaluation.tasks import TASKS
from overnight.preparation.decontaminate import PASSAGE_WORDS
from overnight.recipe import RESUME_MUTABLE, Recipe, load_recipe
from overnight.run import command as run_command
from overnight.run import resume
from overnight.runs import status

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w+")
INDEX_ADDRESS = re.compile(r"--(?:extra-)?index-url|--find-links|(?:pypi|mirror)[\w.-]*/simple")


def missing_paths(text: str) -> list[str]:
    """The paths into this repository that a text names, and that do not exist."""
    named = set(re.findall(r"(?<![\w/])(?:src|tests|tools|benchmarks|docs|\.ci)/[\w./-]+", text))
    return sorted(path for path in named if not (REPOSITORY / path.rstrip(".")).exists())


def broken_links(document: Path, text: str) -> list[str]:
    """The relative links of a document that lead to no file, or to no heading."""
    found = []
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if re.match(r"[a-z]+:", name):
            continue
        headings = path.read_text(encoding="utf-8") if name and path.is_file() else text
        if not path.exists() or (anchor and anchor not in heading_anchors(headings)):
            found.append(target)
    return found


def heading_anchors(text: str) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, REPOSITORY / "benchmarks/README.md"],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert broken_links(document, text) == []


def test_missing_paths_and_links_are_found() -> None:
    text = "# A `b`\nsee src/overnight/nothing.py, [a](#a-b), [b](#b), [c](docs/nothing.md), [d](https://x.y)"
    assert missing_paths(text) == ["docs/nothing.md", "src/overnight/nothing.py"]
    assert broken_links(REPOSITORY / "README.md", text) == ["#b", "docs/nothing.md"]


def commands() -> list[str]:
    """Every `overnight ...` that a document, a recipe or the Makefile shows."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found |= {line.split("  #")[0] for line in text.splitlines() if line.startswith("overnight ")}
        found |= set(re.findall(r"`(overnight [a-z].*?)`", text))
    recipes = (REPOSITORY / "src/overnight/recipes").glob("*.toml")
    found |= {line[1:].strip() for path in recipes for line in path.read_text().splitlines()}
    found |= set(re.findall(r"\$\(BIN\)/(overnight .*)", (REPOSITORY / "Makefile").read_text()))
    return sorted(line for line in found if re.match(r"overnight [a-z]+\b", line))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were called; they parse their options and do no work."""
    names: list[str] = []
    for name in cli.COMMANDS:  # imported later, they would keep what is replaced below
        cli._command_module(name)

    def without_work(module: str) -> ModuleType:
        command = importlib.import_module(module)
        for entrance in ("run", "evaluate_in_processes"):
            replacement = lambda *given: names.append(module.split(".")[1]) or cli.DONE  # type: ignore[func-returns-value]  # noqa: E731
            monkeypatch.setattr(command, entrance, replacement, raising=False)
        return command

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=without_work))
    monkeypatch.setattr(run_command, "run", lambda *given: names.append("train"))
    monkeypatch.setattr(run_command, "train_in_processes", lambda *given: names.append("train") or cli.DONE)
    monkeypatch.setattr(resume, "load_resumed", lambda path: load_recipe("quickstart"))
    monkeypatch.setattr(status, "find_run", Path)
    return names


@pytest.mark.parametrize("command", commands())
def test_command_shown_is_understood(command: str, called: list[str]) -> None:
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        assert words[0] in cli.COMMANDS
    else:
        assert cli.main(words) == cli.DONE
        assert len(called) == 1


SENTENCES = [
    ("README.md", f"{len(TASKS) + 1} tasks and lm-evaluation-harness"),
    ("docs/guide.md", f"{len(CHECKS)} checks, each with the measured value"),
    (
        "docs/guide.md",
        f"{cli.DONE} done, {cli.FAILED} failed, {cli.WRONG_USE} invalid usage, {FROZEN} no progress, "
        f"{cli.INTERRUPTED} stopped and saved",
    ),
    ("docs/guide.md", f"share {PASSAGE_WORDS} words in a row with a benchmark"),
    ("docs/distributed.md", f"no progress for `--timeout-seconds` ({Recipe().compute.timeout_seconds})"),
    ("docs/evaluation.md", f"of at most {LOGITS_AT_ONCE:,} tokens ({RESAMPLES:,} samples with a fixed seed)"),
    ("docs/evaluation.md", f"It needs {LEAST_EXAMPLES} examples"),
    (
        "docs/evaluation.md",
        f"the likeliest of {['ten', 'eleven', 'twelve'][len(DIAGNOSES) - 10]} known mistakes",
    ),
]


def states(document: str, sentence: str) -> bool:
    """True if the document has the sentence, however its lines are broken."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return " ".join(sentence.split()) in " ".join(text.split())


@pytest.mark.parametrize("document, sentence", SENTENCES)
def test_sentence_agrees_with_the_code(document: str, sentence: str) -> None:
    assert states(document, sentence)
    assert not states(document, re.sub(r"[0-9]|twelve", "7", sentence, count=1))  # the negative control


def test_lists_agree_with_the_code() -> None:
    reliability = (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8")
    mutable = reliability.partition("(`RESUME_MUTABLE` in")[2].partition(":")[2].partition(".\n")[0]
    assert set(re.findall(r"`(\w+)`", mutable)) == RESUME_MUTABLE
    evaluation = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| .* \| .* \|$", evaluation.partition("## Methods")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == {"validation", *TASKS}


@pytest.mark.parametrize("command", ["overnight trian quickstart", "overnight report x --colour red"])
def test_unknown_command_is_not_understood(command: str, called: list[str]) -> None:
    assert cli.main(shlex.split(command)[1:]) == cli.WRONG_USE
    assert called == []


def test_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    shown = {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    assert shown
    assert shown <= targets


def our_files() -> Iterator[Path]:
    """Every text file of the repository, without environments and runs."""
    yield from (path for path in REPOSITORY.iterdir() if path.is_file())
    for folder in ("src", "tests", "tools", "benchmarks", "docs", ".ci"):
        paths = (REPOSITORY / folder).rglob("*")
        yield from (path for path in paths if path.is_file() and not CACHES & set(path.parts))


def places(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """path:line of everything that matches."""
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    return [
        f"{path}:{number}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_machine_or_an_index(tmp_path: Path) -> None:
    control = tmp_path / "a.txt"
    control.write_text("ok\nsee /home/me/x\n--index-url x\n")
    paths = [path for path in our_files() if path != Path(__file__)]
    assert places(MACHINE_PATH, [*paths, control]) == [f"{control}:2"]
    assert places(INDEX_ADDRESS, [*paths, control]) == [f"{control}:3"]
    assert places(re.compile(re.escape(str(REPOSITORY) + os.sep)), paths) == []


def test_constraints_pin_every_dependency() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)  # no address, no local label
    pinned = [line.split("==")[0] for line in lines]
    assert pinned == sorted(set(pinned))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in asked} - {"overnight"}
    assert names <= set(pinned)
    assert project["version"] == __version__
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
