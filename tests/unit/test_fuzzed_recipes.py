"""Recipes and command lines with any content are read or refused, in one sentence, and never executed."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from overnight.config import flat_names, from_toml, to_toml
from overnight.options import from_arguments
from overnight.recipe import Recipe, flatten, incompatible_settings, load_recipe, recipe_names
from overnight.training.schedule import ScheduleConfig

NAMES = flat_names(Recipe)
SECTIONS = sorted({*filter(None, NAMES.values())})
DEFAULT = Recipe(run_name="fuzzed", schedule=ScheduleConfig(total_steps=10))
CALL = "__import__('pathlib').Path('mark').touch()"

NUMBERS = (
    *("0", "-1", "1", "9" * 30, "-" + "9" * 400, "0x" + "f" * 300, "9" * 5000, "0b1", "1_000"),
    *("1e400", "-1e400", "nan", "-nan", "inf", "-inf", "-0.0", "1e-400", "0.5"),
)
TEXTS = (
    *('""', '"off"', '"x"', "'''\n'''", r'"\u0000"', r'"\ud800"', '"../../x"', '"/etc/passwd"', '"a/b"'),
    *('"."', r'"a\nb"', '"1h"', '"1e3h"', '"' + "9" * 5000 + 'h"', '"!!python/object/apply:os.system [x]"'),
    *('"${HOME}"', '"{0.__class__}"', '"%s%n"', f'"{CALL}"', CALL, f"'''{CALL}'''"),
)
OTHERS = (
    *("true", "false", "[]", "[[]]", "[1, 2]", '["a"]', "[{}]", "{}", "{a = 1}", "{a.b.c = 1}"),
    *('[{path = "a", weight = 1}]', '[{path = "a", weight = nan}]', '[{path = 1, weight = "x"}]'),
    *('[{path = "a", weight = 1}, {path = "a", weight = 1}]', "1979-05-27", "07:32:00"),
    *("1979-05-27T07:32:00Z", "[" * 2000 + "]" * 2000, "{a = " * 300 + "1" + "}" * 300),
)
VALUES = NUMBERS + TEXTS + OTHERS
STRANGE_NAMES = ("__class__", "__init__", "problems", "a.b", '"n_layer"', '""', "model.n_layer", "модель")
CHARACTERS = (*map(ord, "\t\n\"'=[]{}#.,\x7f\x00"), 0xD800, 0x1F600, 0xFEFF)


def with_a_character(draw: random.Random, text: str) -> str:
    index, gone = draw.randrange(len(text) + 1), draw.choice((0, 1, 2, 40))
    return text[:index] + chr(draw.choice((*CHARACTERS, draw.randrange(0x110000)))) + text[index + gone :]


def with_another_line(draw: random.Random, text: str) -> str:
    """A line twice, or with another value, or the head of another section in its place."""
    lines = text.split("\n")
    number = draw.randrange(len(lines))
    name = lines[number].partition("=")[0]
    head = draw.choice((*SECTIONS, "[model]", "[data.mixture]", "a.b"))
    changed = (f"{name}= {draw.choice(VALUES)}", f"[{head}]", f"{draw.choice(lines)}\n{lines[number]}")
    lines[number] = draw.choices(changed, (4, 1, 1))[0]
    return "\n".join(lines)


def with_a_setting(draw: random.Random, text: str) -> str:
    name = draw.choice((*NAMES, *STRANGE_NAMES))
    section = draw.choice((*[NAMES.get(name)] * 4, *SECTIONS, "x", None))
    line = f"{name} = {draw.choice(VALUES)}\n"
    if section is None:
        return line + text
    head = f"[{section}]\n"
    return text.replace(head, head + line, 1) if head in text else f"{text}\n{head}{line}"


def fuzzed(draw: random.Random, recipes: list[str]) -> str:
    text = draw.choice(recipes)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        text = draw.choice((with_a_character, with_another_line, with_a_setting))(draw, text)
    return text


def read(text: str) -> str:
    """What becomes of a recipe: "valid", "faulty" or "refused". Anything else is raised."""
    try:
        recipe = from_toml(Recipe, text, "mine.toml")
    except ValueError as error:
        return "refused" if str(error).startswith("mine.toml") else f"nameless: {error}"
    assert "nan" in text or incompatible_settings(flatten(recipe), flatten(recipe)) == []
    recipe = dataclasses.replace(recipe, run_name=recipe.run_name or "fuzzed")
    faulty = recipe.problems()
    assert all(isinstance(problem, str) for problem in faulty)
    if not faulty:
        assert from_toml(Recipe, to_toml(recipe), "again") == recipe
    return "faulty" if faulty else "valid"


def fuzz_recipes(count: int) -> dict[str, int]:
    folder = resources.files("overnight") / "recipes"
    recipes = [(folder / f"{name}.toml").read_text(encoding="utf-8") for name in recipe_names()]
    recipes.append(to_toml(DEFAULT))
    return Counter(read(fuzzed(random.Random(seed), recipes)) for seed in range(count))


def fuzz_words(count: int) -> dict[str, int]:
    """The same by the command line: options in any order with any values."""
    outcomes: Counter[str] = Counter()
    words = [value.strip("\"'\n")[:200] for value in VALUES]
    words += ["--", "-", "--help=1", "=", "None", "\0", "a=b"]
    for seed in range(count):
        draw = random.Random(seed)
        given = []
        for _ in range(draw.choice((1, 1, 2, 4))):
            name = draw.choice((*NAMES, *NAMES, "n_layr", "", "model.n_layer", "__class__"))
            name, value = name.replace("_", draw.choice("_-")), draw.choice(words)
            given += [f"--{name}={value}"] if draw.random() < 0.5 else [f"--{name}", value]
        try:
            recipe = from_arguments(Recipe, given, prog="overnight train", about="", default=DEFAULT)
        except ValueError as error:
            outcomes["refused" if "overnight train" in str(error) else f"nameless: {error}"] += 1
        else:
            outcomes["faulty" if recipe.problems() else "valid"] += 1
    return outcomes


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipes, words", [(500, 60), pytest.param(10_000, 1_000, marks=pytest.mark.slow)])
def test_any_recipe_is_read_or_refused(recipes, words):
    for outcomes, least in ((fuzz_recipes(recipes), recipes // 100), (fuzz_words(words), 1)):
        assert {*outcomes} == {"valid", "faulty", "refused"}, outcomes
        assert min(outcomes.values()) >= least, outcomes  # the fuzzing reaches every ending
    assert not Path("mark").exists()


def test_reader_that_executes_its_input_is_detected():
    """The negative control: as nanoGPT's configurator reads its files."""
    settings = to_toml(dataclasses.replace(DEFAULT, run_name=CALL))
    assert read(settings) == "valid"
    assert not Path("mark").exists()
    values = {"run_name": from_toml(Recipe, settings, "mine.toml").run_name}
    eval(values["run_name"])
    assert Path("mark").exists()


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    draw = random.Random(0)
    path.write_bytes(b"run_name = 'a\xff'")
    with pytest.raises(ValueError, match=r"mine\.toml .*UTF-8.* byte 13"):
        load_recipe(str(path))
    for _ in range(200):
        path.write_bytes(draw.randbytes(draw.randrange(60)))
        try:
            load_recipe(str(path))
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - either way is right


@pytest.mark.timeout(60)
@pytest.mark.parametrize("repeated", ["[", "a", "#", 'x = "', "x = ["])
def test_megabyte_of_nonsense_is_refused_without_delay(repeated):
    with pytest.raises(ValueError, match=r"mine\.toml"):
        from_toml(Recipe, repeated * 10**6 + "\ny", "mine.toml")
