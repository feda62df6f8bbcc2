"""C4, C5: checkpoints are damaged in many ways, and none is used; the run goes on from the one before."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_trials import RUN, Place, find_difference, finish, record, report, run, train
from mutants import replace
from overnight.training.checkpoint.format import list_checkpoints
from report import Report

Damage = Callable[[Path, random.Random], None]


def flip(checkpoint: Path, draw: random.Random) -> None:
    """One bit: of any file as likely, or of any byte as likely."""
    files = sorted(checkpoint.iterdir())
    path = draw.choice(files)
    if draw.random() < 0.5:
        (path,) = draw.choices(files, [file.stat().st_size for file in files])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(checkpoint: Path, draw: random.Random) -> None:
    """A file loses its end, or all."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lengthen(checkpoint: Path, draw: random.Random) -> None:
    """A file has more behind its end."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def blank(checkpoint: Path, draw: random.Random) -> None:
    """Some bytes of a file are zero, as a file system leaves what it has not written."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    sound = path.read_bytes()
    begin = draw.randrange(len(sound))
    damaged = sound[:begin] + bytes(len(sound[begin : begin + 512])) + sound[begin + 512 :]
    path.write_bytes(damaged if damaged != sound else b"")


def swap(checkpoint: Path, draw: random.Random) -> None:
    """Two files have each other's name."""
    one, other = draw.sample(sorted(checkpoint.iterdir()), 2)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def take_older(checkpoint: Path, draw: random.Random) -> None:
    """One file is that of the checkpoint before, sound in itself."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    path.write_bytes((list_checkpoints(checkpoint.parent)[-2] / path.name).read_bytes())


def remove(checkpoint: Path, draw: random.Random) -> None:
    """A file is missing."""
    draw.choice(sorted(checkpoint.iterdir())).unlink()


OTHERS: tuple[Damage, ...] = (truncate, lengthen, blank, swap, take_older, remove)


def choose(number: int, flips: int) -> Damage:
    """The damage of a trial: bit flips first, then all others in turn."""
    return flip if number < flips else OTHERS[(number - flips) % len(OTHERS)]


def accept_all() -> None:
    """The mutant: a package that believes what it reads."""
    replace("overnight.training.checkpoint.load:verify_checkpoint", lambda *_: None)


def load_damaged(folder: Path, out: Path, counts: tuple[int, int], seed: int, *, mutant: bool) -> None:
    """Load the newest checkpoint, damaged each time anew; what became of it, as JSON, into `out`."""
    from overnight.model.gpt import initialize
    from overnight.training import OptimizerConfig
    from overnight.training.checkpoint.load import load_checkpoint, read_model
    from overnight.training.optim import build_optimizer
    from overnight.training.state import TrainState

    if mutant:
        accept_all()
    *_, newest = list_checkpoints(folder / RUN / "checkpoints")
    model = read_model(newest)
    initialize(model, 1)
    state = TrainState(model, build_optimizer(model, OptimizerConfig()))

    def digest() -> str:
        total = hashlib.sha256()
        for parameter in model.parameters():
            total.update(parameter.detach().numpy().tobytes())
        return f"{total.hexdigest()} {state.step} {len(state.optimizer.state)} {state.guard}"

    draw, before, found = random.Random(seed), digest(), Counter[str]()
    sound = {path: path.read_bytes() for path in newest.iterdir()}
    for number in range(sum(counts)):
        damage = choose(number, counts[0])
        damage(newest, draw)
        try:
            load_checkpoint(state, newest)
            became = "loaded"
        except ValueError:
            became = "refused" if digest() == before else "refused too late"
        except Exception:  # noqa: BLE001 - the mutant's, of any kind
            became = "crashed"
        found[f"{damage.__name__} {became}"] += 1
        for path, data in sound.items():
            path.write_bytes(data)
        if became != "refused":
            initialize(model, 1)
            state.optimizer.state.clear()
            state.step, state.guard = 0, type(state.guard)()
    load_checkpoint(state, newest)  # the repaired one is whole
    out.write_text(json.dumps(found))


def count_refused(
    folder: Path, counts: tuple[int, int], seed: int, *, mutant: bool = False
) -> dict[str, int]:
    """How many were refused, loaded, and so on, by damage."""
    out = folder / f"found-{mutant}.json"
    run(functools.partial(load_damaged, mutant=mutant), folder, out, counts, seed)
    found: dict[str, int] = json.loads(out.read_text())
    return found


def total(found: dict[str, int], ending: str) -> int:
    """Over all damages."""
    return sum(count for name, count in found.items() if name.endswith(f" {ending}"))


def measure_corruption(place: Place, counts: dict[str, int], seed: int) -> Report:
    """C4. Raises ValueError if a damaged checkpoint is used, or if the mutant notices them all."""
    folder = place.new("damaged")
    finish(folder)
    flips, others = counts["flips"], counts["damages"]
    found = count_refused(folder, (flips, others), seed)
    mutant = count_refused(folder, (flips, others), seed, mutant=True)
    refused, loaded = total(found, "refused"), total(mutant, "loaded")
    if refused != flips + others:
        raise ValueError(f"damaged checkpoints were used: {found}")
    if not loaded:
        raise ValueError("without verification all damage was found: the campaign proves nothing")
    flipped = mutant.get("flip loaded", 0)
    return report(
        title="C4: damaged checkpoints are refused",
        rows=[
            [
                "single bits flipped: refused before a weight was changed",
                f"{found.get('flip refused', 0)}/{flips}",
            ],
            [
                "files truncated, lengthened, blanked, swapped, older, missing: refused",
                f"{refused - found.get('flip refused', 0)}/{others}",
            ],
            [
                "control, a mutant that does not verify: flipped bits loaded silently",
                f"{flipped}/{flips}",
            ],
            ["control: other damage loaded silently", f"{loaded - flipped}/{others}"],
        ],
        measured={"found": found, "mutant": mutant},
    )


def fall_back(place: Place, name: str, whole: Path, seed: int, before: Any = None) -> str | None:
    """Damage the newest checkpoint of a copy and go on; what is wrong with what follows, if anything."""
    folder, draw = place.folder / name, random.Random(seed)
    shutil.copytree(whole, folder)
    *_, newest = list_checkpoints(folder / RUN / "checkpoints")
    damage = choose(seed % 2 * draw.randrange(1, 100), 1)
    damage(newest, draw)
    ended = train(folder, before)
    wrong = find_difference(folder, record(whole)) if ended.status == 0 else f"status {ended.status}"
    if not wrong and f"{newest.name} is " not in ended.said:
        wrong = "nothing was said"
    shutil.rmtree(folder)
    return f"{damage.__name__}: {wrong}" if wrong else None


def measure_fallback(place: Place, counts: dict[str, int], seed: int) -> Report:
    """C5. Raises ValueError if a run does not go on from the checkpoint before, or the mutant does."""
    whole = place.new("full")
    finish(whole)
    trials, controls = counts["fallbacks"], max(3, counts["fallbacks"] // 10)
    for number in range(trials):
        if wrong := fall_back(place, f"fallback-{number}", whole, seed + number):
            raise ValueError(f"fallback {number}: {wrong}")
    wrongs = [fall_back(place, f"mutant-{n}", whole, seed + n, accept_all) for n in range(controls)]
    caught = sum(wrong is not None for wrong in wrongs)
    if not caught:
        raise ValueError("the mutant without verification goes on as well: the campaign proves nothing")
    return report(
        title="C5: a damaged newest checkpoint falls back to the one before",
        rows=[
            ["newest checkpoint damaged: reported, and ended in the same bits", f"{trials}/{trials}"],
            ["control, a mutant that does not verify: noticed by the campaign", f"{caught}/{controls}"],
        ],
        measured={"control": wrongs},
    )
