"""U5: what users hand in (command lines, environments, files), drawn at random, and judged.

    python tests/campaigns/faults_input.py --seed 7 --trial texts-31     # one trial again, and what it said
    python tests/campaigns/faults_input.py --seed 7 --kinds texts --trials 500    # every fault found

A trial ends with status 0 and what a reference program finds (json, pyarrow, tokenizers, transformers, numpy,
tomllib, Python's own numbers), or with a documented status, one sentence and nothing left behind, within a
limit of time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from faults_input_models import draw_folder, draw_run, draw_task, draw_tokenizer
from faults_input_texts import draw_prompts, draw_shards, draw_texts, trial_of_texts
from faults_input_trials import Bench, Trial, make_ground
from faults_input_words import (
    draw_environment,
    draw_literal,
    draw_parsed,
    draw_recipe,
    draw_whole,
    expected_results,
    trial_of_options,
)
from faults_trials import DONE, Place, prepare_place, report
from mutants import original, replace
from report import Report

Draw = Callable[[random.Random], Trial]
SHARES = {"commands": 2, "texts": 2, "tokenizers": 2, "folders": 2, "environment": 2}  # of the trials, times
REFERENCES = ("tokenizers", "transformers", "pyarrow.parquet")


class Found(NamedTuple):
    """A faulty trial."""

    name: str
    words: tuple[str, ...]
    wrong: str


def prepare_bench(place: Place) -> Bench:
    """Where trials are made; what they import is imported once."""
    for name in REFERENCES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    return Bench(make_ground(place.folder / "ground", place.folder / "text"), place.folder / "trials")


def list_kinds(bench: Bench) -> dict[str, tuple[str, Draw]]:
    """By name: what is drawn, in words, and how."""
    expected = functools.cache(lambda: expected_results(bench.try_out))
    return {
        "options": ("options in odd spellings: Python's values, or refused", draw_parsed),
        "literal": ("words after --: prompts", draw_literal),
        "commands": ("whole commands with odd values and paths", draw_whole),
        "texts": ("files of text: the documents of json, gzip, pyarrow", draw_texts),
        "shards": ("shards of other programs: the ids of numpy", draw_shards),
        "prompts": ("files of prompts: the lines of Python", draw_prompts),
        "recipes": ("recipes: the values of tomllib", draw_recipe),
        "tokenizers": ("tokenizer.json of others: the ids of tokenizers", draw_tokenizer),
        "folders": ("Hugging Face folders: the logits and the text of Transformers", draw_folder),
        "runs": ("damaged runs and shards: used, or refused", draw_run),
        "tasks": ("files of tasks: the examples of json", draw_task),
        "environment": (
            "variables, umask, closed streams: the plain result",
            lambda draw: draw_environment(expected(), draw),
        ),
    }


def draw_trial(draw_of: Draw, seed: int, name: str) -> Trial:
    """The trial of a name and a seed, always the same."""
    return draw_of(random.Random(f"{seed} {name}"))


def run_trials(
    bench: Bench, kind: str, draw_of: Draw, trials: int, seed: int
) -> tuple[Counter[str], list[Found]]:
    """How the trials of a kind ended, and the faulty ones."""
    ended, found = Counter[str](), []
    for number in range(trials):
        name = f"{kind}-{number}"
        trial = draw_trial(draw_of, seed, name)
        outcome, wrong = bench.try_out(trial)
        ended["done" if outcome.status == DONE else "refused"] += 1
        if wrong is not None:
            found.append(Found(name, trial.words, wrong))
    return ended, found


# ---------------------------------------------------------------- mistakes that must be found


def raise_keys() -> None:
    """A mutant: a lookup that fails escapes."""
    replace("overnight.runs.command:run", lambda config: {}[config.folder])


def leave_folder() -> None:
    """A mutant: the folder of the output is made before the options are looked at."""
    real = original("overnight.conversion.command:run")

    def run(config: Any) -> Any:
        Path(config.out or "hf").mkdir(exist_ok=True)
        return real(config)

    replace("overnight.conversion.command:run", run)


def forget_last() -> None:
    """A mutant: the last document of a file is lost."""
    real = original("overnight.preparation.documents:_read_json_file")
    replace("overnight.preparation.documents:_read_json_file", lambda *given: list(real(*given))[:-1])


def round_numbers() -> None:
    """A mutant: a number of an option is another."""
    replace("overnight.options:_number", lambda text: int(float(text)) + 1)


def never_end() -> None:
    """A mutant: it waits for ever."""
    replace("overnight.runs.command:run", lambda _: time.sleep(10**6))


CONTROLS: dict[str, tuple[Callable[[], None], Trial, str]] = {
    "lets an error escape": (raise_keys, Trial(("runs",)), "traceback"),
    "makes a folder before it refuses": (
        leave_folder,
        Trial(("convert", "nowhere/at/all", "--out", "new-hf")),
        "leftover",
    ),
    "loses the last document": (
        forget_last,
        trial_of_texts("source.jsonl", b"".join(b'{"text": "line %d"}\n' % n for n in range(40)), "fail"),
        "difference",
    ),
    "reads a number as another": (
        round_numbers,
        trial_of_options("generate", [("max_new_tokens", int, "7")], ["--max-new-tokens", "7"]),
        "difference",
    ),
    "waits for ever": (never_end, Trial(("runs",), seconds=2.0), "no end"),
}


def check_controls(bench: Bench) -> list[list[str]]:
    """Each mutant, found in its trial. Raises ValueError if one is not, or its trial is faulty without it."""
    rows = []
    for words, (mutant, trial, expected) in CONTROLS.items():
        _, sound = bench.try_out(trial)
        _, wrong = bench.try_out(trial, mutant)
        if sound is not None or wrong is None or not wrong.startswith(expected):
            raise ValueError(f"the mutant that {words}: {wrong!r}, and {sound!r} without it")
        rows.append([f"control, a mutant that {words}: found", "1/1"])
    return rows


def measure_input(place: Place, counts: dict[str, int], seed: int) -> Report:
    """U5. Raises ValueError if a trial is faulty, or a mutant is not found."""
    bench, rows, measured = prepare_bench(place), [], {}
    for kind, (about, draw_of) in list_kinds(bench).items():
        trials = max(1, counts["inputs"] * SHARES.get(kind, 1))
        ended, found = run_trials(bench, kind, draw_of, trials, seed)
        if found:
            raise ValueError(
                f"seed {seed}, {len(found)} faulty: {found[0].name} {found[0].words!a}: {found[0].wrong}"
            )
        rows.append([f"{about}: {ended['refused']:,} refused, none faulty", f"{trials:,}"])
        measured[kind] = dict(ended)
    return report(
        title="U5: what users hand in",
        rows=[*rows, *check_controls(bench)],
        measured=measured,
        settings={"seed": seed},
    )


def explore(options: argparse.Namespace) -> int:
    """Print every fault, or one trial in full."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare_bench(prepare_place(Path(folder)))
        kinds = list_kinds(bench)
        if options.trial:
            kind = options.trial.rpartition("-")[0]
            trial = draw_trial(kinds[kind][1], options.seed, options.trial)
            outcome, wrong = bench.try_out(trial)
            print(f"{trial.words!a}\n{outcome.out}\n{outcome.said}")
            print(f"status {outcome.status}; {wrong}; {outcome.left}")
            return wrong is not None
        faults = 0
        for kind in options.kinds or kinds:
            begun_at = time.monotonic()
            ended, found = run_trials(bench, kind, kinds[kind][1], options.trials, options.seed)
            for each in found:
                words = [word[:80] for word in each.words]
                print(f"seed {options.seed} {each.name}: {words!a}\n    {each.wrong[:900]!a}")
            print(
                f"{kind}: {dict(ended)}, {len(found)} faulty, {time.monotonic() - begun_at:.0f} s", flush=True
            )
            faults += len(found)
    return faults > 0


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trial", help="one trial again, by its name")
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(explore(read_options(sys.argv[1:])))
