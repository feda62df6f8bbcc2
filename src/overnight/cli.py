"""The command line: parses, calls one command, prints errors. It imports the rest when it is needed.

A command is a folder: its options are a dataclass in the folder's `__init__`, which needs no torch, so that
`--help` is instant; its `run` is in the file command.py.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from overnight import __version__
from overnight.distributed import launcher

if TYPE_CHECKING:
    from overnight.recipe import Recipe

Settings = TypeVar("Settings", bound="Recipe")


class Command(NamedTuple):
    """A row of the table of commands."""

    options: str
    """The folder and the class of its options; `run` is in the folder's file command.py."""
    about: str
    example: str


COMMANDS = {
    "quickstart": Command(
        "quickstart.QuickstartConfig",
        "Text, training and report on a laptop, offline, in minutes",
        "overnight quickstart",
    ),
    "prepare": Command(
        "preparation.PrepareConfig",
        "Text to shards of tokens",
        "overnight prepare ~/my-notes --tokenizer bpe-8192",
    ),
    "inspect": Command(
        "inspection.InspectConfig",
        "Statistics of prepared shards: counts, duplicates, quality",
        "overnight inspect data/python-docs",
    ),
    "train": Command(
        "run.Recipe",
        "Train a RECIPE; also --resume RUN, --init-from MODEL",
        "overnight train shakespeare-char-cpu --n_layer=4 --dropout 0.1",
    ),
    "generate": Command(
        "generation.GenerateConfig",
        "Generate text with a model",
        'overnight generate runs/quickstart "The value of" --temperature 0.8',
    ),
    "evaluate": Command(
        "evaluation.EvaluateConfig",
        "Loss, perplexity, bits per byte and tasks of a model",
        "overnight evaluate runs/quickstart",
    ),
    "doctor": Command(
        "doctor.DoctorConfig",
        "Check a RECIPE, its data and this machine before a run",
        "overnight doctor quickstart",
    ),
    "plan": Command(
        "planning.PlanConfig",
        "Memory, time, disk and cost of a RECIPE",
        "overnight plan gpt2-124m --dollars-per-hour 2.50",
    ),
    "launch": Command(
        "jobs.LaunchConfig",
        "A job file for Slurm, SkyPilot, SageMaker, Kubernetes",
        "overnight launch gpt2-124m --slurm --nodes 2 --gpus-per-node 8",
    ),
    "bench": Command(
        "bench.BenchConfig",
        "Speed of training variants on this machine, from plain float32",
        "overnight bench --model gpt2-124m --out bench",
    ),
    "ablate": Command(
        "ablation.AblationConfig",
        "What settings are worth: paired runs over several seeds",
        "overnight ablate gpt2-124m --add optimizer=muon --total-tokens 1B",
    ),
    "report": Command(
        "report.ReportConfig",
        "Report of a run, or a comparison of several",
        "overnight report runs/quickstart",
    ),
    "runs": Command(
        "runs.RunsConfig",
        "The runs in runs/, and the state of each",
        "overnight runs --json",
    ),
    "convert": Command(
        "conversion.ConvertConfig",
        "Write a model for other programs",
        "overnight convert runs/quickstart --to hf --out quickstart-hf",
    ),
}

RENAMED_COMMANDS = {"ladder": "bench"}
OF_RECIPES = frozenset({"train", "doctor", "plan", "launch", "ablate"})
FLAGS_BEFORE_RECIPE = frozenset({"--slurm", "--skypilot", "--sagemaker", "--kubernetes"})
TRAINING = frozenset({"train", "quickstart", "plan", "doctor", "ablate"})
COMPILING = TRAINING | {"bench"}
SECONDS_TO_PRINT = 2.0
UNUSABLE_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def run_command() -> NoReturn:
    """The command `overnight`, to the end of its process."""
    launcher.exit_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _prepare_process(words)
    try:
        return _run(words)
    except ValueError as error:  # a mistake of the user
        return _refuse(error)
    except BrokenPipeError:  # the reader of our output has closed it
        sys.stdout = None  # or Python reports the same error again on exit
        return FAILED
    except OSError as error:
        return _fail(error)
    except FloatingPointError as error:  # NaN or infinity in the model
        _print_error(str(error))
        return FAILED
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED


def _prepare_process(words: list[str]) -> None:
    """Set what must be set before torch is imported; a command that trains may start again."""
    launcher.open_missing_streams()
    if {*words[:1]} & COMPILING and not {"-h", "--help"} & {*words}:
        launcher.keep_compiled_code()
        if words[0] in TRAINING:
            launcher.restart_with_large_pages(words)
    launcher.terminate_with_parent()


def _refuse(error: ValueError) -> int:
    """Print the user's error; of several processes with the same error only the main one prints."""
    is_shared = isinstance(error, launcher.CollectiveValueError)
    if is_shared and not launcher.is_main_process():
        time.sleep(SECONDS_TO_PRINT)  # the launcher ends all processes as soon as one has ended
    else:
        nul = "a path contains a NUL character, which no file's name can: remove it"
        _print_error(nul if "embedded null" in str(error) else str(error))
    return DONE if is_shared and launcher.record_usage_error() else WRONG_USE


def _fail(error: OSError) -> int:
    """Print the system's error. A path that can't be used is the user's to change, as any wrong use."""
    where = f" ({error.filename})" if error.filename else ""
    remedy = "fix that and repeat the command; a run continues with --resume"
    try:
        os.getcwd()  # noqa: PTH109 - its error is what is asked for
    except FileNotFoundError:
        remedy = "the current folder was deleted: change to another one (cd) and repeat the command"
    _print_error(f"{error.strerror or error}{where}; {remedy}")
    if isinstance(error, launcher.PeerLostError):  # another process has failed, not this one
        return launcher.LOST
    return WRONG_USE if error.errno in UNUSABLE_PATH else FAILED


def _print_error(sentence: str) -> None:
    """Print a sentence in one line: a control character, which a path or a value may hold, as its escape."""
    sentence = CONTROL.sub(lambda found: ascii(found[0])[1:-1], sentence)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may listen
        print(f"overnight: {sentence}", file=sys.stderr, flush=True)


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return DONE if words else WRONG_USE
    if words[0] == "--version":
        print(__version__)
        return DONE
    name, *rest = words
    if name in RENAMED_COMMANDS:
        print(f"overnight {name} is now overnight {RENAMED_COMMANDS[name]}", file=sys.stderr)
        name = RENAMED_COMMANDS[name]
    if name not in COMMANDS:
        from overnight.config import nearest

        raise ValueError(f"there is no command {name}{nearest(name, COMMANDS)}")
    if name in OF_RECIPES and not rest:
        print(_recipes(name), file=sys.stderr)
        raise ValueError(
            f"overnight {name} needs a recipe: quickstart, for example, or shakespeare-char-cpu; the others "
            "are for a GPU"
        )
    if name in {"train", "ablate"}:
        return _train(rest) if name == "train" else _ablate(rest)
    return _run_on_recipe(name, rest) if name in OF_RECIPES else _call(name, rest)


def _options_of(name: str) -> Any:
    """The class of a command's options."""
    folder, _, options = COMMANDS[name].options.partition(".")
    return getattr(importlib.import_module(f"overnight.{folder}"), options)


def _command_module(name: str) -> Any:
    """The module with a command's `run`."""
    folder, _, _ = COMMANDS[name].options.partition(".")
    return importlib.import_module(f"overnight.{folder}.command")


def _call(name: str, rest: list[str]) -> int:
    """Parse the command's own options and run it.

    If it asks for several processes, each of them parses the options again.
    """
    from overnight.options import from_arguments

    asked = from_arguments(_options_of(name), rest, prog=f"overnight {name}", about=_about(name))
    command = _command_module(name)
    if getattr(asked, "processes", None) is not None and not launcher.is_launched():
        return int(command.evaluate_in_processes(asked, [name, *rest]))
    command.run(asked)
    return DONE


def _train(rest: list[str]) -> int:
    """A recipe's settings are its options; the recipe, or the run to be resumed, comes first.

    If it asks for several processes, each of them parses the options again.
    """
    words = ["train", *rest]
    default = resumed = None
    named = _take_resumed(rest)
    if named is not None:
        from overnight.run.resume import load_resumed
        from overnight.runs.status import find_run

        resumed = find_run(named)
        default = load_resumed(resumed)
    _, recipe = _read_recipe("train", _options_of("train"), rest, default)
    command = _command_module("train")

    if recipe.compute.processes is not None and not launcher.is_launched():
        return int(command.train_in_processes(recipe, resumed, words))
    command.run(recipe, resumed)
    return DONE


def _ablate(rest: list[str]) -> int:
    """The options after the recipe's name apply to it and to the recipe of `--baseline`."""
    name, config = _read_recipe("ablate", _options_of("ablate"), rest)
    baseline = config.baseline and _read_recipe("ablate", type(config), [config.baseline, *rest[1:]])[1]
    status: int = _command_module("ablate").run(config, name, baseline, rest)
    return status


def _run_on_recipe(name: str, rest: list[str]) -> int:
    """Like `train`, with a few more options; flags may precede the recipe's name."""
    flags = list(itertools.takewhile(lambda word: word in FLAGS_BEFORE_RECIPE, rest))
    recipe_name, config = _read_recipe(name, _options_of(name), rest[len(flags) :] + flags)
    status: int | None = _command_module(name).run(config, recipe_name)
    return status or DONE


def _read_recipe(
    command: str, cls: type[Settings], rest: list[str], default: Recipe | None = None
) -> tuple[str, Settings]:
    """The name of the recipe that comes first, and that recipe with the options after it.

    With `default` there is no name, and the options change the default.
    """
    from overnight.options import from_arguments
    from overnight.recipe import Recipe, load_recipe, with_settings

    name, words = "RECIPE", rest
    if default is None and words and not words[0].startswith("-"):
        name, *words = words
        default = load_recipe(name)
    elif default is None and not {"-h", "--help"} & {*words}:
        raise ValueError(
            f"overnight {command} needs a recipe before its options; `overnight {command}` lists them"
        )
    default = default or Recipe(run_name=name)
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if given & {"--total-tokens", "--total-steps"}:  # the length can be given in two ways
        default = with_settings(default, total_steps=None)
    # Its prompt is of its own text, python-docs; those of the other recipes fit any text.
    if given & {"--data", "--mixture"} and name == "quickstart":
        default = with_settings(default, sample_prompts=("",))
    wider = cls(**vars(default))
    read = from_arguments(cls, words, prog=f"overnight {command}", about=_about(command), default=wider)
    if "--tokenizer" in given:  # a recipe's own is for texts; this one was asked for
        from overnight.preparation.prepare import require_tokenizer

        require_tokenizer(read.data)
    return name, read


def _take_resumed(words: list[str]) -> str | None:
    """Remove `--resume RUN` or `--resume=RUN` from `words`; the run, or None if it is not there."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--resume":
            del words[index]
            if not equals and index == len(words):
                raise ValueError("overnight train --resume needs a run")
            return value if equals else words.pop(index)
    return None


def _recipes(name: str) -> str:
    """The recipes that come with the package, in a line each."""
    from overnight.recipe import describe_recipes

    described = describe_recipes()
    width = max(map(len, described))
    return "\n".join(
        [
            f"usage: overnight {name} RECIPE [OPTIONS]    (a recipe of this list, or a .toml file)",
            "",
            *(f"  {recipe:<{width}}  {about}"[:80] for recipe, about in described.items()),
            "",
            "`overnight plan RECIPE` shows its size and the expected duration on this machine.",
            "",
        ]
    )


def _about(name: str) -> str:
    more = f"\n\n`overnight {name}` alone lists the recipes." if name in OF_RECIPES else ""
    return f"{COMMANDS[name].about}.{more}\n\nExample: {COMMANDS[name].example}"


def _help() -> str:
    """The list of commands, as a literal so that it is printed without imports."""
    return "\n".join(
        [
            "usage: overnight COMMAND ...    (overnight COMMAND --help tells more)",
            "",
            "Reproduce GPT-2 while you sleep; keep the proof when you wake.",
            "",
            *[f"  {name:<12}{command.about}" for name, command in COMMANDS.items()],
            "",
            "Begin with: overnight quickstart",
        ]
    )
