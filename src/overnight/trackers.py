"""Copies of the metrics in other programs: TensorBoard, Weights & Biases, Trackio.

Trackers are only written to; the run directory remains the record. Each is an extra, imported when it is
used, and none needs an account: without a login, Weights & Biases logs offline.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Log = Callable[[int, Mapping[str, float]], None]
"""log(step, values): `step` counts finished updates; the names of the values become those of the curves."""

PROJECT = "overnight"


@contextlib.contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, object]
) -> Iterator[Log]:
    """Open the named trackers and yield the function that logs to all of them; they are closed at the end.

    `folder` is the run's directory; opening the same one again continues its curves. Steps that are computed
    again after an interruption replace the earlier ones where the tracker can do that. Values that are not
    finite are left out. Raises ValueError for an unknown or missing tracker, before anything is written.
    """
    if problems := find_problems(names):
        raise ValueError("; ".join(problems))
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[name](folder, run_name, dict(config))) for name in names]

        def log(step: int, values: Mapping[str, float]) -> None:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            for log_to_one in logs:
                log_to_one(step, finite)

        yield log


def find_problems(names: Sequence[str]) -> list[str]:
    """One sentence for each tracker that is unknown or not installed."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            nearest = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0)[0]
            known = ", ".join(TRACKERS)
            problems.append(f"unknown tracker {name!r}; did you mean {nearest!r}? There are {known}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"the tracker {name!r} is not installed; pip install 'overnight[{name}]'")
    return problems


@contextlib.contextmanager
def _open_tensorboard(folder: Path, _name: str, _config: dict[str, object]) -> Iterator[Log]:
    """Event files in the run directory: `tensorboard --logdir runs` shows all runs together."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    # TensorBoard's own writer: torch.utils.tensorboard adds only conversions from tensors.
    writer = EventFileWriter(str(folder / "tensorboard"))
    has_started = False

    def log(step: int, values: Mapping[str, float]) -> None:
        nonlocal has_started
        if not has_started:  # makes TensorBoard drop what an interrupted session logged from this step on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            writer.add_event(event_pb2.Event(step=step, session_log=start))
            has_started = True
        tags = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.add_event(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=tags)))

    with contextlib.closing(writer):
        yield log


@contextlib.contextmanager
def _open_wandb(folder: Path, name: str, config: dict[str, object]) -> Iterator[Log]:
    """A Weights & Biases run; without a login it stays in the run directory, for `wandb sync`."""
    import wandb

    mode = wandb.setup().settings.mode  # the user's own, from WANDB_MODE or their settings
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    id_file = folder / "wandb-id"  # random, kept in the run directory: a resumed run is the same run
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex, encoding="ascii")
    with wandb.init(
        project=PROJECT,
        dir=folder,
        id=id_file.read_text(encoding="ascii"),
        name=name,
        config=config,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(mode=mode, console="off"),
    ) as run:
        yield lambda step, values: run.log(dict(values), step=step)


@contextlib.contextmanager
def _open_trackio(_folder: Path, name: str, config: dict[str, object]) -> Iterator[Log]:
    """A Trackio run in its local database, which `trackio show` opens; no server and no account."""
    import trackio

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for --json
        run = trackio.init(project=PROJECT, name=name, config=config, resume="allow", embed=False)
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # unlike run.finish(), leaves no work for the exit


TRACKERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}
