"""What the documents, recipes and settings files say is so: paths, commands, settings, versions."""

from __future__ import annotations

import importlib
import math
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from overnight import cli
from overnight.model.model_config import PRESETS
from overnight.recipe import Recipe, flatten, load_recipe, recipe_names
from overnight.run import command as run_command
from overnight.runs import status
from overnight.training.batch import BatchPlan, plan_batches
from overnight.training.schedule import learning_rate_multiplier

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "NOTEBOOK.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
RECIPES = REPOSITORY / "src/overnight/recipes"


CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def our_files() -> Iterator[Path]:
    """Every text file of the repository that is ours; neither the environment nor what runs have written."""
    yield from (path for path in REPOSITORY.iterdir() if path.is_file())
    for folder in ("src", "tests", "tools", "benchmarks", "docs", ".ci"):
        paths = (REPOSITORY / folder).rglob("*")
        yield from (path for path in paths if path.is_file() and not CACHES & set(path.parts))


# ---------------------------------------------------------------- README


def tree_paths(document: str) -> list[str]:
    """The paths of the tree in a ```text block: two spaces deeper means inside the folder above."""
    (block,) = re.findall(r"^```text\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    found, parents = [], [""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents[depth + 1 :] = [parents[depth] + name]
        found.append(parents[depth + 1])
    return found


def test_the_tree_is_read_as_it_is_written() -> None:
    tree = "```text\nsrc/\n  a.py   first\n  model/\n    gpt.py   GPT\ntests/   all\n```\n"
    assert tree_paths(tree) == ["src/", "src/a.py", "src/model/", "src/model/gpt.py", "tests/"]


def test_every_path_of_the_readme_s_tree_exists() -> None:
    paths = tree_paths((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert len(paths) > 10
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_path_a_document_names_exists() -> None:
    named = {
        match
        for document in DOCUMENTS
        for match in re.findall(
            r"(?:src|tests|tools|benchmarks|docs|\.ci)/[\w./]+", document.read_text(encoding="utf-8")
        )
    }
    assert "tests/test_architecture.py" in named
    assert sorted(path for path in named if not (REPOSITORY / path.rstrip(".")).exists()) == []


def test_no_figure_is_left_open() -> None:
    open_lines = [
        f"{document.name}:{number}: {line}"
        for document in DOCUMENTS
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1)
        if "@@" in line
    ]
    assert not open_lines, "measure these:\n" + "\n".join(open_lines)


def commands() -> list[str]:
    """Every `overnight ...` that a document shows in a block or names in a line."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found |= {line.split("  #")[0] for line in text.splitlines() if line.startswith("overnight ")}
        found |= set(re.findall(r"`(overnight [a-z].*?)`", text))
    found |= {line[1:].strip() for path in RECIPES.glob("*.toml") for line in path.read_text().splitlines()}
    found |= set(
        re.findall(r"\$\(BIN\)/(overnight .*)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    )
    return sorted(line for line in found if re.match(r"overnight [a-z]+\b", line))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that the command called; their work is not done, only their options are parsed."""
    names: list[str] = []

    def without_work(module: str) -> ModuleType:
        stage = importlib.import_module(module)
        for entrance in ("run", "run_in_processes"):
            monkeypatch.setattr(
                stage,
                entrance,
                lambda *given: names.append(module) or cli.DONE,
                raising=False,
            )
        return stage

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=without_work))
    monkeypatch.setattr(run_command, "run", lambda *given: names.append("train"))
    monkeypatch.setattr(run_command, "train_in_processes", lambda *given: names.append("train") or cli.DONE)
    monkeypatch.setattr(run_command, "load_resumed", lambda path: load_recipe("quickstart"))
    monkeypatch.setattr(status, "find_run", Path)
    return names


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_is_understood(command: str, called: list[str]) -> None:
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        assert words[0] in cli.VERBS
    else:
        assert cli.main(words) == cli.DONE
        assert called == [words[0]]


@pytest.mark.parametrize("command", ["overnight trian quickstart", "overnight report x --colour red"])
def test_a_command_that_does_not_exist_is_not(command: str, called: list[str]) -> None:
    assert cli.main(shlex.split(command)[1:]) == cli.WRONG_USE
    assert called == []


def test_every_make_target_shown_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, re.MULTILINE))
    assert 5 <= len(targets) <= 12
    shown = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert shown
    assert shown <= targets


# ---------------------------------------------------------------- recipes


def test_every_recipe_is_found() -> None:
    assert recipe_names() == sorted(path.stem for path in RECIPES.glob("*.toml"))
    assert set(PRESETS) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_sound_and_says_what_it_promises(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.problems() == []
    assert recipe.run_name == name
    head = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "Promises:" in head


def repeated_defaults(recipe: str) -> list[str]:
    """The settings of a recipe's text that have their default value, and so need not stand there."""
    defaults = flatten(Recipe())
    sections = {field.name for field in fields(Recipe)}
    written = {}
    for name, value in tomllib.loads(recipe).items():
        written.update(value if name in sections and isinstance(value, dict) else {name: value})
    return [name for name, value in written.items() if defaults[name] == value]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_only_what_differs_from_the_defaults(name: str) -> None:
    assert repeated_defaults((RECIPES / f"{name}.toml").read_text(encoding="utf-8")) == []


def test_a_repeated_default_is_found() -> None:
    assert repeated_defaults("seed = 1337\n[model]\nn_layer = 12\nn_head = 2\n") == ["seed", "n_layer"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_of_a_published_size_has_that_size(name: str) -> None:
    model = load_recipe(name).model
    for size in ("n_layer", "n_head", "n_embd", "context_length"):
        assert getattr(model, size) == getattr(PRESETS[name], size), size


# GPT-3 paper, table 2.1, copied a second time: batch in tokens as printed, learning rate.
GPT3_BATCH_AND_RATE = {
    "125m": (0.5e6, 6.0e-4),
    "350m": (0.5e6, 3.0e-4),
    "760m": (0.5e6, 2.5e-4),
    "1.3b": (1e6, 2.0e-4),
    "2.7b": (1e6, 1.6e-4),
    "6.7b": (2e6, 1.2e-4),
    "13b": (2e6, 1.0e-4),
    "175b": (3.2e6, 0.6e-4),
}


@pytest.mark.parametrize("name", GPT3_BATCH_AND_RATE)
def test_gpt3_s_recipes_follow_its_table(name: str) -> None:
    recipe = load_recipe(f"gpt3-{name}")
    batch, rate = GPT3_BATCH_AND_RATE[name]
    assert recipe.batch.tokens_per_step == pytest.approx(batch, rel=0.05)
    assert recipe.batch.tokens_per_step % recipe.model.context_length == 0
    assert recipe.optimizer.peak_learning_rate == pytest.approx(rate)
    assert recipe.schedule.total_tokens == 300_000_000_000
    assert recipe.batch.batch_ramp_start_tokens == 32 * 1024
    assert 4e9 <= (recipe.batch.batch_ramp_tokens or 0) <= 12e9


Rates = Callable[[float], float]
"""Full steps done before the one in question -> its learning rate, as a share of the peak."""


def gpt3_schedule(name: str) -> tuple[BatchPlan, Rates]:
    """The steps of a GPT-3 recipe, and its learning rates."""
    recipe = load_recipe(f"gpt3-{name}")
    plan = plan_batches(recipe.batch, recipe.model.context_length, rows_that_fit=16)
    length = plan.full_steps_before(plan.steps_for(recipe.schedule.total_tokens or 0))
    return plan, lambda position: learning_rate_multiplier(position, length, recipe.schedule)


@pytest.mark.parametrize("name", GPT3_BATCH_AND_RATE)
def test_gpt3_s_recipes_peak_at_375_million_tokens_and_are_at_their_floor_at_260_billion(name: str) -> None:
    plan, rates = gpt3_schedule(name)

    def rate_at(tokens: int) -> float:
        """Of the first step that begins after so many tokens."""
        return rates(plan.full_steps_before(plan.steps_for(tokens) + 1) - 1)

    assert rate_at(365_000_000) < 0.99
    assert rate_at(375_000_000) == pytest.approx(1.0, abs=1e-6)
    assert rate_at(255_000_000_000) > 0.1005
    assert rate_at(260_000_000_000) == pytest.approx(0.1, abs=1e-6)
    assert rate_at(299_000_000_000) == pytest.approx(0.1, abs=1e-6)


def papers_rate(tokens: int) -> float:
    """The learning rate that GPT-3 had after so many tokens, as a share of its peak (appendix B)."""
    done = min(1.0, max(0.0, (tokens - 375e6) / (260e9 - 375e6)))
    return min(tokens / 375e6, 0.55 + 0.45 * math.cos(math.pi * done))


@pytest.mark.parametrize("name", GPT3_BATCH_AND_RATE)
def test_gpt3_s_recipes_have_the_paper_s_learning_rate_also_while_the_batch_grows(name: str) -> None:
    plan, rates = gpt3_schedule(name)
    steps = [*range(0, 20_000, 20), *range(20_000, plan.steps_for(300_000_000_000), 500)]
    papers = [papers_rate(plan.tokens_before(step + 1)) for step in steps]
    assert [rates(plan.full_steps_before(step + 1) - 1) for step in steps] == pytest.approx(papers, abs=0.01)
    by_steps = max(abs(rates(step) - rate) for step, rate in zip(steps, papers, strict=True))
    assert by_steps > 0.5  # a ramp's first steps counted as whole ones would be seen


# ---------------------------------------------------------------- settings files

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w+")
INDEX_ADDRESS = re.compile(r"--(?:extra-)?index-url|--find-links|(?:pypi|mirror)[\w.-]*/simple")


def places(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """path:line of everything that matches."""
    return [
        f"{path}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_place_on_one_machine() -> None:
    paths = [path for path in our_files() if path != Path(__file__)]
    assert places(MACHINE_PATH, paths) == []
    assert places(re.compile(re.escape(str(REPOSITORY) + os.sep)), paths) == []
    assert places(INDEX_ADDRESS, paths) == []


def test_such_a_place_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ok\nsee /home/me/x\n--index-url x\n")
    assert places(MACHINE_PATH, [path]) == [f"{path}:2"]
    assert places(INDEX_ADDRESS, [path]) == [f"{path}:3"]


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)  # no address, no local label
    pinned = [line.split("==")[0] for line in lines]
    assert pinned == sorted(set(pinned))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in asked} - {"overnight"}
    assert names <= set(pinned)


def test_the_version_is_said_once() -> None:
    import overnight

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == overnight.__version__


def test_ci_can_be_run() -> None:
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
