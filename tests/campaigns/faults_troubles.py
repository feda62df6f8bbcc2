"""The troubles that a command may meet before its first step, one by one, and what is to be said of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults_broken import (
    Undo,
    change,
    copy,
    flipped,
    give_up_privileges,
    half,
    hide_trackers,
    high_bit,
    in_place_of,
    lead_nowhere,
    limit_memory,
    lock,
    make_runs,
    moved_away,
    nothing,
    remove,
    spoilt_line,
    trap_disk,
    trap_memory,
    trap_writes,
    vouch_for_large_ids,
    within_line,
    without_end,
    without_rights,
)
from faults_trials import WRONG_USE, Before
from mutants import original, replace


@dataclass(frozen=True)
class Trouble:
    """Something that is broken."""

    group: str
    name: str
    says: tuple[str, ...]
    """What the sentence names: settings, options, files."""
    damage: Callable[[Path], Undo | None] = nothing
    """Breaks something in the folder of a trial; returns what takes it back, where `mend` does not."""
    before: Before = nothing
    """Breaks something in the process of the command."""
    options: tuple[str, ...] = ()
    """Of the command."""
    options_after: tuple[str, ...] = ()
    """Of the command once it is mended."""
    status: int = WRONG_USE
    kinds: tuple[str, ...] = ("new", "resumed")
    words: tuple[str, ...] = ()
    """The command, if it is not the one that would go on."""

    def begin(self, folder: Path) -> Undo:
        """Break it; returns what takes it back."""
        return self.damage(folder) or nothing


# ---------------------------------------------------------------- all of them


NEW, RESUMED = ("new",), ("resumed",)
SHARD, VALIDATION = "shards/train-00000.bin", "shards/validation-00000.bin"
SOURCE = "spare/model"
LOST = ("runs/small/checkpoints",)
on_disk = functools.partial(Trouble, "of the disk")
of_text = functools.partial(Trouble, "of the text and its tokenizer")
of_model = functools.partial(Trouble, "of the initial model", kinds=NEW)
of_machine = functools.partial(Trouble, "of the machine")
of_settings = functools.partial(Trouble, "of the settings")
of_run = functools.partial(Trouble, "of the run to resume", kinds=RESUMED)


def of_file(name: str, what: str, edit: Callable[[bytes], bytes]) -> Trouble:
    """A file of the text whose bytes are others."""
    return of_text(what, (name,), change(name, edit))


DISK = (
    on_disk("too little space", ("runs/small", "--keep-checkpoints"), before=trap_disk),
    on_disk("a read-only file system", ("Read-only", "runs/small"), before=trap_writes),
    on_disk(
        "runs may not be written",
        ("Permission denied", "runs/small"),
        make_runs,
        give_up_privileges,
        kinds=NEW,
    ),
    *[
        on_disk(f"{name} {what}", (name,), in_place_of(name, make), kinds=NEW)
        for name in ("runs", "runs/small")
        for what, make in (("is a file", Path.touch), ("leads nowhere", lead_nowhere))
    ],
    *[
        on_disk(
            f"{name} may not be written",
            (name,),
            without_rights(name),
            give_up_privileges,
            kinds=RESUMED,
        )
        for name in ("runs/small", *(f"runs/small/{each}" for each in ("checkpoints", "events", ".lock")))
    ],
)
TEXT = (
    of_text("shards missing", ("shards",), remove("shards")),
    of_text("manifest missing", ("manifest.json",), remove("shards/manifest.json")),
    of_text("manifest torn", ("shards", "manifest.json"), change("shards/manifest.json", half)),
    of_file("shards/manifest.json", "manifest changed", lambda data: data.replace(b"char", b"cher")),
    of_text("a shard missing", (SHARD,), remove(SHARD)),
    of_file(SHARD, "a shard cut short", half),
    of_file(SHARD, "a shard empty", lambda _: b""),
    of_file(SHARD, "a shard of other tokens", flipped),
    of_text("validation missing", (VALIDATION,), remove(VALIDATION)),
    of_file(VALIDATION, "validation cut short", half),
    of_file(VALIDATION, "validation of other tokens", flipped),
    of_text("a shard too many", ("train-00099.bin",), copy(SHARD, "shards/train-00099.bin")),
    of_text("ids outside the vocabulary", (SHARD,), vouch_for_large_ids),
    of_text("another tokenizer", ("shards/tokenizer",), copy("spare/tokenizer", "shards/tokenizer")),
    of_text("tokenizer missing", ("shards/tokenizer",), remove("shards/tokenizer")),
    of_file("shards/tokenizer/tokenizer.json", "tokenizer torn", half),
    of_text("text of other ids", ("vocab_size=", "shards"), copy("spare", "shards"), kinds=RESUMED),
    of_text("another text", ("shards",), copy("others", "shards"), kinds=RESUMED),
    of_text(
        "less text than a row",
        ("shards",),
        options=("--context-length", "4096", "--tokens-per-step", "49152"),
        kinds=NEW,
    ),
    of_text("no such text", ("nowhere",), options=("--data", "nowhere"), kinds=NEW),
    of_text(
        "text that is no UTF-8",
        ("text/00.txt", "on-bad-text"),
        change("text/00.txt", lambda _: b"\x80\xff" * 9),
        options=(raw := ("--data", "text", "--tokenizer", "characters", "--validation-fraction", "0.2")),
        options_after=raw,
        kinds=NEW,
    ),
)
MODEL = (
    of_model("no such model", ("nowhere",), options=("--init-from", "nowhere")),
    of_model(
        "all its checkpoints damaged",
        (SOURCE,),
        change(f"{SOURCE}/checkpoints/*/model.safetensors", flipped),
        options=("--init-from", SOURCE),
        options_after=("--init-from", SOURCE),
    ),
    of_model(
        "its one checkpoint damaged",
        (newest := f"{SOURCE}/checkpoints/step-00000006",),
        change(f"{newest}/*", half),
        options=("--init-from", newest),
        options_after=("--init-from", newest),
    ),
    of_model(
        "it has lost its tokenizer",
        (f"{SOURCE}/tokenizer",),
        remove(f"{SOURCE}/tokenizer"),
        options=("--init-from", SOURCE),
        options_after=("--init-from", SOURCE),
    ),
    of_model(
        "it reads another tokenizer",
        ("spare", f"{SOURCE}/tokenizer"),
        options=("--init-from", SOURCE, "--data", "spare"),
        options_after=("--init-from", SOURCE),
    ),
    of_model(
        "it has fewer positions",
        ("context_length=64",),
        options=("--init-from", SOURCE, "--context-length", "64"),
        options_after=("--init-from", SOURCE),
    ),
    of_model(
        "it has other sizes",
        ("n_layer=2",),
        options=("--init-from", SOURCE, "--n-layer", "2"),
        options_after=("--init-from", SOURCE),
    ),
)
MACHINE = (
    of_machine("no such GPU", ("device=cuda:7", "--device"), options=("--device", "cuda:7")),
    of_machine("no such device", ("device=abacus",), options=("--device", "abacus")),
    of_machine("no such precision", ("tf32", "fp32"), options=("--precision", "tf32"), kinds=NEW),
    of_machine("no such head", ("loss=fp8",), options=("--loss", "fp8"), kinds=NEW),
    of_machine("too little memory", ("memory",), before=trap_memory),
    of_machine(
        "a model beyond any memory",
        ("memory",),
        before=limit_memory,
        options=("--n-embd", str(2**17)),
        kinds=NEW,
    ),
    of_machine(
        "a tracker not installed",
        ("wandb", "pip install"),
        before=hide_trackers,
        options=("--trackers", "wandb"),
    ),
)
SETTINGS = (
    of_settings(
        "a step that does not divide",
        ("tokens_per_step=1000", "992"),
        options=("--tokens-per-step", "1000"),
        kinds=NEW,
    ),
    of_settings(
        "a micro-batch that does not divide",
        ("micro_batch_size=7",),
        options=("--micro-batch-size", "7"),
    ),
    of_settings(
        "a prompt longer than the context",
        ("prompt",),
        options=("--sample-prompts", "Line 1 tells of " * 9),
    ),
    of_settings(
        "another vocabulary",
        ("vocab_size=999",),
        options=("--vocab-size", "999"),
        kinds=NEW,
    ),
    of_settings("an unknown option", ("--n-leyer", "n-layer"), options=("--n-leyer", "2")),
    of_settings("no such task", ("hellasvag", "hellaswag"), options=("--tasks", "hellasvag")),
    of_settings(
        "a task without its file",
        ("nowhere", "hellaswag_val.jsonl"),
        options=("--tasks", "hellaswag", "--task-files", "nowhere"),
    ),
    of_settings(
        "a task with a torn file",
        ("hellaswag_val.jsonl",),
        change("tasks/*", lambda data: data[:-9]),
        options=(task := ("--tasks", "hellaswag", "--task-files", "tasks")),
        options_after=task,
    ),
    of_settings("a torn recipe", ("small.toml",), change("small.toml", within_line), kinds=NEW),
    of_settings(
        "another setting than before",
        ("n_head", "4", "2"),
        options=("--n-head", "4"),
        kinds=RESUMED,
    ),
    of_settings("fewer steps than done", ("total_steps=3",), options=("--total-steps", "3"), kinds=RESUMED),
)
OF_RUN = (
    of_run(
        "every checkpoint damaged",
        LOST,
        change("runs/small/checkpoints/*/model.safetensors", flipped),
    ),
    *[
        of_run(f"{name} {what}", (f"runs/small/{name}",), damage(f"runs/small/{name}"))
        for name in ("recipe.toml", "data.json", "environment.json")
        for what, damage in (("missing", remove), ("torn", functools.partial(change, edit=half)))
    ],
    of_run(
        "a recipe that lost lines", ("recipe.toml", "lines"), change("runs/small/recipe.toml", without_end)
    ),
    of_run(
        "begun once more without its recipe",
        ("runs/small",),
        remove("runs/small/recipe.toml"),
        words=("train", "small.toml"),
    ),
    of_run("begun once more", ("runs/small",), words=("train", "small.toml")),
    of_run("its checkpoints missing", LOST, remove("runs/small/checkpoints")),
    of_run("its checkpoints lead nowhere", LOST, moved_away("runs/small/checkpoints")),
    of_run("metrics damaged", ("metrics.jsonl", "2"), change("runs/small/metrics.jsonl", spoilt_line)),
    of_run("metrics of bits", ("metrics.jsonl",), change("runs/small/metrics.jsonl", high_bit)),
    of_run(
        "evaluations damaged",
        ("evaluations.jsonl", "3"),
        change("runs/small/events/evaluations.jsonl", lambda data: data + data[:20] + b"\n" + data),
    ),
    of_run(
        "its tokenizer another",
        ("runs/small/tokenizer",),
        copy("spare/tokenizer", "runs/small/tokenizer"),
    ),
    of_run("its tokenizer torn", ("runs/small/tokenizer",), change("runs/small/tokenizer/*", half)),
    of_run("another trains it", ("runs/small",), lock),
    of_run(
        "a setting that nobody knows",
        ("n_wings",),
        change("runs/small/recipe.toml", lambda data: data.replace(b"\n", b"\nn_wings = 2\n", 1)),
    ),
)
TROUBLES: tuple[Trouble, ...] = (*DISK, *TEXT, *MODEL, *MACHINE, *SETTINGS, *OF_RUN)


# ---------------------------------------------------------------- mutants: each has a check less


def without_disk_check() -> None:
    """Nobody asks how much space there is."""
    replace("overnight.run.preflight:check_checkpoint_space", nothing)


def without_shard_check() -> None:
    """Shards are believed."""
    read_manifest = original("overnight.data.shards:read_manifest")
    replace("overnight.data.shards:verify_shard", nothing)
    replace("overnight.data.shards:verify", lambda folder, _=None: read_manifest(folder))


def without_memory_check() -> None:
    """Nobody asks how much memory there is."""
    replace("overnight.run.preflight:require_memory", nothing)


def without_rights_check() -> None:
    """What may not be written is found when it is written."""
    replace("overnight.run_directory:RunDirectory._check_rights", nothing)


def without_record_check() -> None:
    """What is left of a recipe is taken for all of it."""
    replace("overnight.run_directory:RunDirectory.read_recipe", lambda self: self.recipe.read_text())
    replace("overnight.run_directory:RunDirectory.check_record", nothing)


def without_verification() -> None:
    """Checkpoints are believed."""
    replace("overnight.training.checkpoint.load:verify_checkpoint", nothing)


MUTANTS: tuple[tuple[Before, str, str], ...] = (
    (without_disk_check, "too little space", "does not check space"),
    (without_shard_check, "a shard of other tokens", "does not verify shards"),
    (without_memory_check, "too little memory", "does not check memory"),
    (without_rights_check, "runs/small/checkpoints may not be written", "does not check permissions"),
    (without_record_check, "a recipe that lost lines", "accepts a truncated recipe"),
    (without_verification, "every checkpoint damaged", "does not verify checkpoints"),
)
