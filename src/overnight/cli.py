"""The street door: parses, calls a stage, prints errors; nothing else."""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from overnight import __version__

if TYPE_CHECKING:
    from overnight.recipe import Recipe

Settings = TypeVar("Settings", bound="Recipe")


class Verb(NamedTuple):
    """A command: `module` holds its Config and its `run`."""

    module: str
    config: str
    about: str
    example: str


VERBS = {
    "quickstart": Verb(
        "overnight.quickstart.command",
        "QuickstartConfig",
        "Everything on a laptop, offline, in a few minutes",
        "overnight quickstart",
    ),
    "prepare": Verb(
        "overnight.preparation.command",
        "PrepareConfig",
        "Text to shards of tokens",
        "overnight prepare ~/my-notes --tokenizer bpe-8192",
    ),
    "inspect": Verb(
        "overnight.inspection.command",
        "InspectConfig",
        "What is in prepared shards: counts, duplicates, odd texts",
        "overnight inspect data/python-docs",
    ),
    "train": Verb(
        "overnight.run.command",
        "Recipe",
        "RECIPE to a trained GPT; also --resume RUN, --init-from MODEL",
        "overnight train shakespeare-char-cpu --n_layer=4 --dropout 0.1",
    ),
    "generate": Verb(
        "overnight.generation.command",
        "GenerateConfig",
        "Let a model write",
        'overnight generate runs/quickstart "The value of" --temperature 0.8',
    ),
    "evaluate": Verb(
        "overnight.evaluation.command",
        "EvaluateConfig",
        "Loss, perplexity and bits per byte of a model",
        "overnight evaluate runs/quickstart",
    ),
    "doctor": Verb(
        "overnight.doctor.command",
        "DoctorConfig",
        "RECIPE checked before the night: what would go wrong?",
        "overnight doctor quickstart",
    ),
    "plan": Verb(
        "overnight.planning.command",
        "PlanConfig",
        "Will RECIPE fit, how long, how much disk and money?",
        "overnight plan gpt2-124m --dollars-per-hour 2.50",
    ),
    "launch": Verb(
        "overnight.jobs.command",
        "LaunchConfig",
        "RECIPE as a job file for Slurm, SkyPilot, SageMaker, Kubernetes",
        "overnight launch gpt2-124m --slurm --nodes 2 --gpus-per-node 8",
    ),
    "ladder": Verb(
        "overnight.bench.command",
        "BenchConfig",
        "The speed ladder, float32 to everything, on this machine",
        "overnight ladder --model gpt2-124m --out ladder",
    ),
    "report": Verb(
        "overnight.report.command",
        "ReportConfig",
        "The morning page of a run, or several compared",
        "overnight report runs/quickstart",
    ),
    "runs": Verb(
        "overnight.runs.command",
        "RunsConfig",
        "What is in runs/, and how each is doing",
        "overnight runs --json",
    ),
    "convert": Verb(
        "overnight.conversion.command",
        "ConvertConfig",
        "Write a model for other programs",
        "overnight convert runs/quickstart --to hf --out quickstart-hf",
    ),
}

FLAGS_BEFORE_RECIPE = frozenset({"--slurm", "--skypilot", "--sagemaker", "--kubernetes"})
SECONDS_TO_SPEAK = 2.0
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def run_command() -> NoReturn:
    """The command `overnight`, to the end of its process."""
    from overnight.distributed.launcher import exit_process

    exit_process(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        from overnight.distributed.machine import keep_compiled_code
        from overnight.run_directory import cache_folder

        keep_compiled_code(cache_folder() / "compiled")
    if (
        arguments is None
        and words[:1] in (["train"], ["quickstart"], ["plan"], ["doctor"])
        and not {"-h", "--help"} & set(words)
    ):
        from overnight.distributed.machine import restart_with_large_pages

        restart_with_large_pages(words)
    try:
        return _run(words)
    except ValueError as error:  # what a user wrote
        return _refuse(error)
    except BrokenPipeError:  # whoever read our output has enough
        sys.stdout = None  # or Python complains once more on leaving
        return FAILED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"overnight: {error.strerror or error}{where}; mend that, and give the command again; "
            "a run goes on with --resume",
            file=sys.stderr,
        )
        return _status_of(error)
    except FloatingPointError as error:  # the model's numbers are no numbers
        print(f"overnight: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("overnight: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refuse(error: ValueError) -> int:
    """Say what is wrong with what a user wrote. What several processes refuse together, the main one says."""
    from overnight.distributed.launcher import CollectiveValueError, is_main_process, record_usage_error

    is_shared = isinstance(error, CollectiveValueError)
    if is_shared and not is_main_process():
        time.sleep(SECONDS_TO_SPEAK)  # a launcher ends all when the first has ended
    else:
        print(f"overnight: {error}", file=sys.stderr)
    return DONE if is_shared and record_usage_error() else WRONG_USE


def _status_of(error: OSError) -> int:
    """A process that ends because others have is not the one that failed."""
    from overnight.distributed.launcher import LOST, PeerLostError

    return LOST if isinstance(error, PeerLostError) else FAILED


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return DONE if words else WRONG_USE
    if words[0] == "--version":
        print(__version__)
        return DONE
    from overnight.config import nearest

    name, *rest = words
    if name not in VERBS:
        raise ValueError(f"there is no command {name}{nearest(name, VERBS)}")
    if name == "train":
        return _train(rest)
    if name in {"doctor", "plan", "launch"}:
        return _run_on_recipe(name, rest)
    return _call(name, rest)


def _call(name: str, rest: list[str]) -> int:
    """Parse the stage's own Config and hand it to the stage.

    Where it asks for several processes, each does this again, by itself.
    """
    from overnight.config import from_arguments
    from overnight.distributed.launcher import is_launched

    stage = importlib.import_module(VERBS[name].module)
    config = getattr(stage, VERBS[name].config)
    asked = from_arguments(config, rest, prog=f"overnight {name}", about=_about(name))
    if getattr(asked, "processes", None) is not None and not is_launched():
        status: int = stage.run_in_processes(asked, [name, *rest])
        return status
    stage.run(asked)
    return DONE


def _train(rest: list[str]) -> int:
    """A recipe's settings are its options; the recipe, or the run that goes on, comes first.

    Where it asks for several processes, each does this again, by itself.
    """
    words = ["train", *rest]
    from overnight.distributed.launcher import is_launched
    from overnight.recipe import Recipe
    from overnight.run import command as run_command
    from overnight.run.resume import load_resumed
    from overnight.runs.status import find_run

    named = _take_option(rest, "--resume")
    resumed = find_run(named) if named is not None else None
    default = None if resumed is None else load_resumed(resumed)
    _, recipe = _read_recipe("train", Recipe, rest, default)
    if recipe.compute.processes is not None and not is_launched():
        return run_command.train_in_processes(recipe, resumed, words)
    run_command.run(recipe, resumed)
    return DONE


def _run_on_recipe(verb: str, rest: list[str]) -> int:
    """As `train` takes a recipe, with a few options more; flags may stand before its name."""
    stage = importlib.import_module(VERBS[verb].module)
    flags = list(itertools.takewhile(lambda word: word in FLAGS_BEFORE_RECIPE, rest))
    name, config = _read_recipe(verb, getattr(stage, VERBS[verb].config), rest[len(flags) :] + flags)
    return stage.run(config, name) or DONE


def _read_recipe(
    verb: str, cls: type[Settings], rest: list[str], default: Recipe | None = None
) -> tuple[str, Settings]:
    """The name of the recipe that comes first, and that recipe with the options after it.

    With `default` there is no name, and the options change that.
    """
    from overnight.config import from_arguments
    from overnight.recipe import Recipe, load_recipe, recipe_names

    name = "RECIPE"
    words = [
        "--init-from" + word.removeprefix("--from") if _is_option(word, "--from") else word for word in rest
    ]
    if default is None and words and not words[0].startswith("-"):
        name = words.pop(0)
        default = load_recipe(name)
    elif default is None and not {"-h", "--help"} & set(words):
        raise ValueError(f"overnight {verb} needs a recipe: {', '.join(recipe_names())}, or a .toml file")
    default = default or Recipe(run_name=name)
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--total-tokens" in given:  # there are two ways to say how long: one takes the place of the other
        default = replace(default, schedule=replace(default.schedule, total_steps=None))
    if "--total-steps" in given:
        default = replace(default, schedule=replace(default.schedule, total_tokens=None))
    wider = cls(**vars(default))
    return name, from_arguments(cls, words, prog=f"overnight {verb}", about=_about(verb), default=wider)


def _is_option(word: str, option: str) -> bool:
    return word == option or word.startswith(f"{option}=")


def _take_option(words: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `words`; its value, or None if it is not there."""
    for index, word in enumerate(words):
        if _is_option(word, option):
            _, equals, value = words.pop(index).partition("=")
            if not equals and index >= len(words):
                raise ValueError(f"overnight train {option} needs a run")
            return value if equals else words.pop(index)
    return None


def _about(name: str) -> str:
    more = (
        f"\n\n`overnight {name}` alone lists the recipes."
        if name in {"train", "doctor", "plan", "launch"}
        else ""
    )
    return f"{VERBS[name].about}.{more}\n\nExample: {VERBS[name].example}"


def _help() -> str:
    """The list of commands; written out here so that it takes no time to show."""
    return "\n".join(
        [
            "usage: overnight COMMAND ...    (overnight COMMAND --help tells more)",
            "",
            "Reproduce GPT-2 while you sleep; keep the proof when you wake.",
            "",
            *[f"  {name:<12}{verb.about}" for name, verb in VERBS.items()],
            "",
            "Begin with: overnight quickstart",
        ]
    )
