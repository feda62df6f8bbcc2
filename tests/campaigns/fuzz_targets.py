"""What is fuzzed: for each promise a function that any bytes are given to, and a mutant that it must find.

    python tests/campaigns/fuzz_targets.py encoding - -runs=1000 -seed=1

It is the process that fuzz.py starts: atheris ends it, and instruments overnight's modules as they are
imported. The second word is "mutant", or a dash; the others are libFuzzer's. What it begins with goes to a
folder seeds/ in the current folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_texts import (
    DOCUMENTS,
    SPECIAL,
    Check,
    check_encoding,
    check_special,
    check_stream,
    drop_half_pairs,
    make_tokenizers,
    token_by_token,
    trust_text,
)
from mutants import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

CONTEXT = 16


def check_generation() -> Check:
    """P3: any prompt and any way of sampling is answered, or refused in a sentence before a word."""
    import torch

    from overnight.conversion import open_model as open_model_module
    from overnight.generation import command as generation_command
    from overnight.generation.quantize import generation_precisions
    from overnight.model.gpt import GPT, initialize
    from overnight.model.model_config import ModelConfig

    torch.set_num_threads(1)
    tokenizer = make_tokenizers()[2]
    precision = generation_precisions("cpu")[0]

    def open_model(name: str) -> Any:
        model = GPT(
            ModelConfig(
                n_layer=1, n_head=2, n_embd=8, context_length=CONTEXT, vocab_size=tokenizer.vocab_size
            )
        )
        initialize(model, seed=1)
        here = Path(name)
        return open_model_module.OpenedModel(
            model=model.eval(),
            tokenizer=tokenizer,
            origin=here,
            tokenizer_folder=here,
            run=None,
            end_ids=frozenset([tokenizer.end_of_text]),
        )

    replace("overnight.conversion.open_model:open_model", open_model)

    def check(data: bytes) -> None:
        config = draw_generation(data, precision)
        written, said = io.StringIO(), ""
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(io.StringIO()):
            try:
                generation_command.run(config)
            except ValueError as error:
                said = str(error) or "nothing"
        text = written.getvalue()
        assert "\n" not in said, said
        assert not (said and text), (said, text)
        text.encode()
        for line in text.splitlines() if config.json else ():
            assert 0 <= json.loads(line)["tokens"] <= config.max_new_tokens

    return check


def draw_generation(data: bytes, precision: Any) -> Any:
    """What bytes ask of `overnight generate`: little of it usual."""
    import atheris

    from overnight.generation import GenerateConfig

    draw = atheris.FuzzedDataProvider(data)

    def one(usual: Any, other: Callable[[], Any]) -> Any:
        return other() if draw.ConsumeBool() else usual

    def whole() -> int:
        return int(draw.ConsumeInt(draw.ConsumeIntInRange(1, 12)))

    return GenerateConfig(
        model="tiny",
        max_new_tokens=one(3, lambda: min(24, whole())),
        temperature=one(1.0, draw.ConsumeFloat),
        top_k=one(None, whole),
        top_p=one(None, draw.ConsumeFloat),
        seed=one(0, whole),
        samples=one(1, lambda: min(9, whole())),
        json=draw.ConsumeBool(),
        device=one("cpu", lambda: draw.PickValueInList(["", "cuda:99", "cpu;rm", "cp\0u", "meta", "mps:-1"])),
        precision=one(precision, lambda: draw.PickValueInList([None, "fp32", "bf16", "int8", "fp64"])),
        stop=tuple(draw.ConsumeUnicode(3) for _ in range(draw.ConsumeIntInRange(0, 2))),
        prompts=tuple(draw.ConsumeUnicode(20) for _ in range(draw.ConsumeIntInRange(0, 3))),
    )


def forget_problems() -> None:
    """A mutant of `generation`: how tokens are drawn is not looked at before."""
    replace("overnight.generation:SamplingConfig.problems", lambda _: [])


def check_recipes() -> Check:
    """U3: any text is a recipe or is refused with a ValueError; a sound one is written and read again."""
    import dataclasses

    from overnight.config import from_toml, to_toml
    from overnight.recipe import Recipe

    def check(data: bytes) -> None:
        try:
            recipe = from_toml(Recipe, data.decode("utf-8", "replace"), "mine.toml")
        except ValueError as error:
            if not str(error).startswith("mine.toml"):
                raise TypeError("a refusal does not say of what") from error
            return
        recipe = dataclasses.replace(recipe, run_name=recipe.run_name or "fuzzed")
        faulty = recipe.problems()
        assert all(isinstance(problem, str) for problem in faulty)
        assert faulty or from_toml(Recipe, to_toml(recipe), "again") == recipe

    return check


def take_any_type() -> None:
    """A mutant of `recipes`: a value of any type is taken."""
    replace("overnight.config:_fits", lambda *_: True)


def check_archive() -> Check:
    """U1: the index of a .pt, which is a zip archive, is sound or refused with a ValueError."""
    from overnight.conversion import safe_unpickle

    path = Path("any.pt")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            safe_unpickle._check_archive(path)

    return check


def believe_archives() -> None:
    """A mutant of `archive`: a damaged one is met by whoever reads on."""
    import zipfile

    def believe(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            archive.testzip()

    replace("overnight.conversion.safe_unpickle:_check_archive", believe)


@dataclass(frozen=True)
class Target:
    """A promise to be broken."""

    promise: str
    make: Callable[[], Check]
    mutant: Callable[[], None]
    most_bytes: int
    """How long an input may be."""
    seeds: Callable[[], list[bytes]] = lambda: [b"\0"]
    """What it begins with."""
    words: Callable[[], list[str]] = lambda: []
    """What is put in now and then."""


def text_seeds() -> list[bytes]:
    """The documents, in both ways of reading bytes."""
    return [b"\0" + DOCUMENTS[0].encode(), b"\xff" + DOCUMENTS[0].encode("utf-16-le")]


def recipe_seeds() -> list[bytes]:
    """The recipes that are shipped."""
    from importlib import resources

    from overnight.recipe import recipe_names

    folder = resources.files("overnight") / "recipes"
    return [(folder / f"{name}.toml").read_bytes() for name in recipe_names()]


def recipe_words() -> list[str]:
    """Names, and values that TOML has."""
    from overnight.config import flat_names
    from overnight.recipe import Recipe

    sections = {f"[{section}]" for section in flat_names(Recipe).values() if section}
    values = ["nan", "-inf", "1e400", "0x", "'off'", "[[", "{a = 1}", "1979-05-27", "true", '"""', "\n"]
    return [*sorted(sections), *flat_names(Recipe), *values]


def archive_seeds() -> list[bytes]:
    """Two tensors as torch saves them."""
    import torch

    file = io.BytesIO()
    torch.save({"model": {"a": torch.arange(6.0), "b": torch.ones(2, 3)}, "model_args": {"n_layer": 1}}, file)
    return [file.getvalue()]


TARGETS = {
    "encoding": Target(
        "P1: encoding is total and reversible",
        check_encoding,
        drop_half_pairs,
        300,
        text_seeds,
        lambda: [*SPECIAL, "\ud83d", "👩‍👩‍👧", "\u2028"],
    ),
    "special": Target("P2: no text becomes a special token", check_special, trust_text, 96),
    "generation": Target(
        "P3: any prompt and parameter is answered or refused", check_generation, forget_problems, 160
    ),
    "stream": Target("P4: a stream is UTF-8, and the decoded text", check_stream, token_by_token, 96),
    "recipes": Target(
        "U3: any recipe is read or refused", check_recipes, take_any_type, 8192, recipe_seeds, recipe_words
    ),
    "archive": Target(
        "U1: the index of a .pt is read or refused", check_archive, believe_archives, 4096, archive_seeds
    ),
}


def counted(check: Check) -> Check:
    """The same; at the first input that shows something wrong, it says which number that was."""
    count = 0

    def check_and_count(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            check(data)
        except BaseException as error:
            print(f"wrong at input {count}: {type(error).__name__}: {error!s:.500}", flush=True)
            raise

    return check_and_count


def main(words: Sequence[str]) -> None:
    """Fuzz one target; atheris ends the process."""
    import atheris

    name, mutant, *options = words
    target = TARGETS[name]
    seeds = Path("seeds")
    seeds.mkdir()
    with atheris.instrument_imports(include=["overnight"]):
        check = target.make()
        for number, seed in enumerate(target.seeds()):
            check(seed)  # what is imported only when it is needed is watched as well
            (seeds / str(number)).write_bytes(seed)
    if mutant == "mutant":
        target.mutant()
    if found := target.words():
        spelled = (
            "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogatepass")) for word in found
        )
        Path("words").write_text("".join(f'"{word}"\n' for word in spelled))
        options.append("-dict=words")
    atheris.Setup(["fuzz", *options, f"-max_len={target.most_bytes}", str(seeds)], counted(check))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
