"""Command lines, recipes and environments, drawn at random."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults_input_trials import Outcome, Trial, damage
from faults_trials import CLOCK, DONE
from mutants import replace

COMMANDS = {
    "prepare": "prepare text --tokenizer characters --out new --workers 1",
    "train": "train small.toml --run-name new",
    "resume": "train --resume runs/small --total-steps 6",
    "inspect": "inspect shards",
    "evaluate": "evaluate runs/small --json",
    "generate": "generate runs/small Line --max-new-tokens 4 --json",
    "report": "report runs/small",
    "runs": "runs --json",
    "plan": "plan gpt2-124m --device-type h100 --json",
    "doctor": "doctor small.toml --only shards --json",
    "convert": "convert runs/small --to hf --out new-hf",
    "launch": "launch small.toml --slurm --gpus-per-node 2 --out job",
}
PARSED = {"quickstart": "quickstart", "bench": "bench", **COMMANDS}
NUMBERS = (
    *("0", "1", "2", "3", "-1", "-0", "+5", "1_000", "1e3", "1E2", "1.0", "1.5", "0.5", "1e-3", " 7 "),
    *("٣", "²", "０", "1,000", "1__0", "0x10", "1e400", "1e-400", "nan", "-nan", "inf", "-inf", "", "True"),
    *("9" * 30, "-" + "9" * 30, "9" * 5000, "1e2147483647", "off", "none", "None", "1e15", "4294967296"),
)
TEXTS = (
    *("", "~", "~/x", "~nobody/x", "-", "-5", "--x", ".", "..", "/", "text", "text/", "small.toml"),
    *("small.toml/", "small.toml/x", "/dev/null", "/dev/full", "fifo", "a b", "loop", "dangling", "shards"),
    *("caf\udce9", "日本", "x" * 300, "x/" * 3000, "\n", "a\nb", "\x1b[31m", "*", "$(touch x)", "a\0b"),
    *("s3://", "http://", "hf://", "file:///etc/passwd", "None", "off", "nowhere/deep", "runs", "runs/small"),
    *("cpu", "cuda:99", "meta", "gpt2", "characters", "bpe-", "bpe--1", "bpe-999999999999", "validation"),
)
ODD_TOML = (
    *("0x1F", "1_0", "1e3", "3.0", "-1", "+7", "nan", "-inf", "1e400", "true", "1979-05-27", "07:32:00"),
    *("[]", "[1, 'a']", "['x']", "{}", "[{path = 'a', weight = 1}]", "[{path = 'a', weight = 1, x = 2}]"),
    *("'''a\nb'''", '"\\u0000"', '"off"', '"OFF"', "''", "9223372036854775808", "9" * 5000),
    *("0o17", "0b1", "1.5e0", "[[1]]"),
)
WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
LASTING = frozenset(
    {"total_steps", "total_tokens", "sample_tokens", "samples", "max_new_tokens", "seconds", "steps"}
    | {"n_layer", "n_embd", "tokens_per_step", "evaluation_tokens", "processes", "workers", "tokenizer"}
    | {"train_tokenizer", "max_time", "context_length", "examples", "micro_batch_size", "tasks"}
)
UNSURE = object()


def _options(command: str) -> dict[str, Any]:
    from overnight.cli import COMMANDS as TABLE
    from overnight.config import flat_types

    folder, _, name = TABLE[PARSED[command].split()[0]].options.partition(".")
    return flat_types(getattr(importlib.import_module(f"overnight.{folder}"), name))


def draw_value(kind: Any, draw: random.Random) -> str:
    """A value for an option, of its type more often than not."""
    literals = [each for part in (kind, *typing.get_args(kind)) for each in typing.get_args(part)]
    words = [each for each in literals if isinstance(each, str)]
    if words and draw.random() < 0.5:
        return draw.choice([*words, words[0].upper(), f" {words[0]}"])
    is_number = {int, float} & {kind, *typing.get_args(kind)}
    if is_number and draw.random() < 0.5:
        return draw.choice(NUMBERS[:15])
    return draw.choice(NUMBERS if bool(is_number) == (draw.random() < 0.9) else TEXTS)


def draw_options(command: str, count: int, draw: random.Random) -> list[tuple[str, Any, str]]:
    """(name, type, value) of some options that take one value."""
    kinds = {name: kind for name, kind in _options(command).items() if kind is not bool}
    names = [draw.choice(sorted(kinds)) for _ in range(count)] if kinds else []
    return [(name, kinds[name], draw_value(kinds[name], draw)) for name in names]


def spell(name: str, value: str, draw: random.Random) -> list[str]:
    """An option and its value in one of the ways in which they can be written."""
    option = "--" + (name if draw.random() < 0.3 else name.replace("_", "-"))
    return [f"{option}={value}"] if draw.random() < 0.5 else [option, value]


def read_value(kind: Any, text: str) -> Any:
    """What Python makes of a value; UNSURE for what may be refused as well as read."""
    kinds = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if type(None) in kinds and text.lower() in {"off", "none"}:
        return None
    if typing.get_origin(kind) is tuple or any(typing.get_origin(each) is typing.Literal for each in kinds):
        return UNSURE
    if str in kinds:
        return os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 - any text
    if int in kinds and WHOLE.fullmatch(text) and len(text) < 4000:
        return int(text)
    if float in kinds and re.fullmatch(r"[+-]?[0-9.]+(e-?[0-9]{1,3})?", text):
        return float(text)
    return UNSURE


def capture(command: str, folder: Path) -> Callable[[], Any]:
    """The command keeps its options, looks at them, and does nothing."""
    from overnight.config import raise_problems

    (folder / "a b").mkdir(exist_ok=True)
    kept: list[dict[str, Any]] = []

    def keep(config: Any, *_: Any) -> int:
        flat = {}
        for name, value in vars(config).items():
            flat |= vars(value) if hasattr(value, "__dataclass_fields__") else {name: value}
        kept.append(flat)
        if hasattr(config, "problems"):
            raise_problems(config.problems(), "these options")
        return 0

    from overnight.cli import COMMANDS as TABLE

    module = "overnight." + TABLE[PARSED[command].split()[0]].options.partition(".")[0] + ".command"
    for name in ("run", "train_in_processes", "evaluate_in_processes"):
        if hasattr(importlib.import_module(module), name):
            replace(f"{module}:{name}", keep)
    return lambda: kept


def draw_parsed(draw: random.Random) -> Trial:
    """Options in odd spellings: the command gets Python's values, or refuses them."""
    command = draw.choice(sorted(PARSED))
    drawn = draw_options(command, draw.choice((1, 1, 2, 3)), draw)
    words = [word for name, _, value in drawn for word in spell(name, value, draw)]
    words += draw.choice(([], [], [], ["--"], ["--nonsense"], ["--json", "--json"], ["--tok=x"]))
    return trial_of_options(command, drawn, words)


def trial_of_options(command: str, drawn: Sequence[tuple[str, Any, str]], words: Sequence[str]) -> Trial:
    """A command with these options, written as `words`."""
    is_plain = not words or not words[-1].startswith("--")
    named = {name for name, *_ in drawn} & {"resume", "model", "data", "source", "runs", "folder", "prompts"}
    has_dash = any(value.startswith("-") for *_, value in drawn)

    def judge(_folder: Path, outcome: Outcome) -> str | None:
        expected = {name: read_value(kind, value) for name, kind, value in drawn}
        if not outcome.captured:
            is_valid = UNSURE not in expected.values() and is_plain and not named and not has_dash
            return f"refused: {outcome.said[-200:]}" if is_valid else None
        found = outcome.captured[0]
        for name, value in expected.items():
            if value is not UNSURE and repr(found.get(name)) != repr(value):
                return f"difference: {name} is {found.get(name)!r}, not {value!r}"
        return None

    return Trial((*PARSED[command].split(), *words), functools.partial(capture, command), judge)


def draw_literal(draw: random.Random) -> Trial:
    """After `--`, or where no option is meant, each word is a prompt."""
    prompts = [
        draw.choice((*TEXTS, "--json", "-x", "--", "-- a", "--seed=3")) for _ in range(draw.randint(1, 3))
    ]
    words = ("generate", "runs/small", "--seed", "5", "--", *prompts)

    def judge(_folder: Path, outcome: Outcome) -> str | None:
        found = outcome.captured and outcome.captured[0]
        if not found:
            return f"refused: {outcome.said[-200:]}"
        return None if list(found["prompts"]) == prompts else f"difference: prompts are {found['prompts']!r}"

    return Trial(words, functools.partial(capture, "generate"), judge)


def make_odd_files(folder: Path) -> None:
    """What the odd paths name."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "a b").mkdir()
    (folder / "home").mkdir()
    os.environ["HOME"] = str(folder / "home")


def draw_whole(draw: random.Random) -> Trial:
    """A whole command with odd values of its options, or an odd path in the place of one of its words."""
    command = draw.choice(sorted(COMMANDS))
    words = COMMANDS[command].split()
    drawn = draw_options(command, draw.choice((0, 1, 1, 2)), draw)
    if command in {"train", "resume", "doctor"}:
        drawn = [each for each in drawn if each[0] not in {"processes", "compile"}]
    drawn = [each for each in drawn if each[2] not in {"ray", "slurm"}]  # they need a cluster
    for name, _, value in drawn:
        words += spell(name, value, draw)
    if not drawn or draw.random() < 0.2:
        words[draw.randrange(1, len(words))] = draw.choice(TEXTS)
    may_last = any(name in LASTING for name, *_ in drawn)
    return Trial(tuple(words), make_odd_files, may_fail=True, may_last=may_last)


def draw_recipe(draw: random.Random) -> Trial:
    """A recipe with odd values: a run has the values that tomllib reads."""
    from overnight.config import flat_names, flat_types
    from overnight.recipe import Recipe

    sections, kinds = flat_names(Recipe), flat_types(Recipe)
    lines: dict[str, list[str]] = {}
    for _ in range(draw.choice((1, 2, 4))):
        name = draw.choice(sorted(sections))
        number = kinds[name] in {int, float} or {int, float} & {*typing.get_args(kinds[name])}
        value = (
            draw.choice(("1", "2", "16", "1_0", "+7", "0x1F") if number and draw.random() < 0.7 else ODD_TOML)
            if number or draw.random() < 0.4
            else json.dumps(draw.choice(TEXTS), ensure_ascii=True).replace("\\udce9", "e")
        )
        lines.setdefault(sections[name] or "", []).append(
            f"{draw.choice((name, name, json.dumps(name)))} = {value}"
        )
    text = (
        "\n".join(lines.pop("", []))
        + "\n"
        + "".join(f"[{section}]\n" + "\n".join(rest) + "\n" for section, rest in lines.items())
    )
    data = text.encode()
    if draw.random() < 0.3:
        data = damage(data, draw)

    def judge(_folder: Path, outcome: Outcome) -> str | None:
        if not outcome.captured:
            return None
        table = tomllib.loads(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read())
        given = {
            k: v
            for key, value in table.items()
            for k, v in (value.items() if isinstance(value, dict) else [(key, value)])
        }
        for name, value in given.items():
            if name == "run_name" and not value:
                continue  # named after its file
            found = outcome.captured[0].get(name)
            if isinstance(value, list):
                continue
            same = found is None if value == "off" else found == value or (value != value and found != found)  # noqa: PLR0124
            if not same and kinds.get(name) is not float:
                return f"difference: {name} is {found!r}, not {value!r}"
        return None

    def arrange(folder: Path) -> Any:
        (folder / "mine.toml").write_bytes(data)
        return capture("train", folder)

    return Trial(("train", "mine.toml"), arrange, judge)


# ---------------------------------------------------------------- the environment

WORDS = (
    "",
    "x",
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "٢",
    "99999",
    "/nowhere/x",
    "/dev/null",
    "relative",
    "~",
    "\udcff",
)
HARMLESS = {
    **dict.fromkeys(("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CUDA_VISIBLE_DEVICES"), WORDS),
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"), WORDS),
    **dict.fromkeys(
        ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME"), WORDS
    ),
    **dict.fromkeys(
        ("MPLCONFIGDIR", "USER", "LOGNAME", "TORCHINDUCTOR_CACHE_DIR", "PYTHONPYCACHEPREFIX"), WORDS
    ),
    "TERM": ("", "dumb", "unknown", "xterm-256color", "vt52"),
    "TZ": ("", "UTC+14", "Asia/Kathmandu", "nowhere", ":"),
    **dict.fromkeys(
        ("LANG", "LC_ALL", "LC_NUMERIC"), ("", "C", "POSIX", "C.UTF-8", "tr_TR.UTF-8", "xx_YY.ISO-8859-1")
    ),
}
OF_PYTHON = {
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16", "utf-8:strict", "ascii:strict", ":replace"),
    "PYTHONUTF8": ("0", "1"),
    "PYTHONHASHSEED": ("0", "7", "random"),
    "PYTHONUNBUFFERED": ("1",),
    "PYTHONOPTIMIZE": ("1", "2"),
    "PYTHONDONTWRITEBYTECODE": ("1",),
    "PYTHONCOERCECLOCALE": ("0",),
}
OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"),
    *(
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_NNODES",
        "SLURM_NODEID",
    ),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_NUM_NODES"),
)
MASKS = (0o000, 0o022, 0o027, 0o077, 0o777)


def result_of(command: str, folder: Path, outcome: Outcome) -> str:
    """What a command is for, without times and speeds."""
    if command in {"train", "resume"}:
        path = folder / ("runs/new" if command == "train" else "runs/small") / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return repr([{key: line[key] for key in line if key not in CLOCK} for line in lines])
    if command in {"prepare", "convert", "launch"}:
        name = {"prepare": "new", "convert": "new-hf", "launch": "job"}[command]
        found = sorted([folder / name, *(folder / name).rglob("*")])
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file()]
        return f"{[path.name for path in found]} {digests}"
    if command in {"report", "doctor", "inspect", "runs"}:
        return command
    return re.sub(r'"(seconds|[a-z_]*per_second|ends_at|load_average)": [^,}]*', "", outcome.out)


def draw_environment(expected: dict[str, str], draw: random.Random) -> Trial:
    """Variables, the rights of new files, closed streams: the same result, or a refusal if there must be."""
    command = draw.choice(sorted(COMMANDS))
    is_fresh = command in {"runs", "launch", "report"} and draw.random() < 0.3
    pool = {**HARMLESS, **OF_PYTHON} if is_fresh else HARMLESS
    chosen = {name: draw.choice(pool[name]) for name in draw.sample(sorted(pool), draw.choice((1, 2, 4)))}
    launched = draw.random() < 0.25
    if launched:
        chosen |= {
            name: draw.choice(WORDS[:8]) for name in draw.sample(OF_LAUNCHERS, draw.choice((1, 1, 2, 3)))
        }
    mask, closed = draw.choice(MASKS), draw.choice((None, None, None, 0, 1, 2))
    closed = None if is_fresh or (launched and closed == 2) else closed  # a refusal is heard
    chosen = {name: value for name, value in chosen.items() if name not in {"HF_HOME"} or value}

    def arrange(folder: Path) -> None:
        os.umask(mask)
        for name, value in chosen.items():
            os.environ[name] = value
        if closed is not None:
            os.close(closed)
            setattr(sys, ("stdin", "stdout", "stderr")[closed], None)

    def judge(folder: Path, outcome: Outcome) -> str | None:
        about = f"{chosen} umask {mask:o} closed {closed}"
        if outcome.status != DONE:
            return None if launched else f"refused in {about}: {outcome.said[-300:]}"
        if closed == 1 and command not in {"prepare", "convert", "launch", "train", "resume"}:
            return None
        found = result_of(command, folder, outcome)
        return None if found == expected[command] else f"difference in {about}: {found[:300]}"

    is_job = {"RANK", "WORLD_SIZE"} <= {*chosen} or {"SLURM_PROCID", "SLURM_NTASKS"} <= {*chosen}
    return Trial(
        tuple(COMMANDS[command].split()),
        arrange,
        judge,
        may_fail=launched,
        may_last=is_job,
        is_fresh=is_fresh,
    )


def expected_results(try_out: Callable[[Trial], tuple[Outcome, str | None]]) -> dict[str, str]:
    """The result of each command in a plain environment. Raises ValueError if one has none."""
    found: dict[str, str] = {}
    for command, words in COMMANDS.items():

        def judge(folder: Path, outcome: Outcome, command: str = command) -> str | None:
            return "result: " + result_of(command, folder, outcome)

        outcome, said = try_out(Trial(tuple(words.split()), judge=judge))
        if outcome.status != DONE or said is None or not said.startswith("result: "):
            raise ValueError(f"{command} does not work: {said} {outcome.said[-500:]}")
        found[command] = said.removeprefix("result: ")
    return found
