"""The top of a run's page: how it stands, the numbers one looks for first, and its rivals."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np

from overnight.report.curves import median
from overnight.report.markup import Markup, element, joined, notice, paragraph, section
from overnight.report.record import Record, is_finite
from overnight.report.status import RunStatus, find_setting
from overnight.report.words import duration, short, significant


def state_sentence(status: RunStatus) -> str:
    """Where the run stands: "finished: all 2,000 steps", "stopped at step 1,240 of 2,000"."""
    of_all = f"step {status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    if status.state == "finished":
        return f"finished: all {status.step:,} steps"
    if status.state == "running":
        left = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
        return f"running: {of_all}{left}"
    if status.state == "stopped":
        return f"stopped at {of_all}"
    return "empty: no step is finished yet" if status.state == "empty" else f"damaged; last seen at {of_all}"


def header(record: Record) -> Markup:
    """The run's name and state, what to know before believing a number, and the numbers looked for first."""
    return joined(
        [
            Markup("<header>"),
            paragraph(_model_words(record), "kicker"),
            element("h1", record.status.name),
            paragraph(_lead(record), "lead"),
            _notices(record),
            _headline(record),
            Markup("</header>"),
        ]
    )


def _model_words(record: Record) -> str:
    """What was trained, as far as the recipe tells: GPT · 12 layers, 12 heads, width 768, context 1,024."""
    shape = (
        ("n_layer", "{} layers"),
        ("n_head", "{} heads"),
        ("n_embd", "width {}"),
        ("context_length", "context {:,}"),
    )
    values = [(words, find_setting(record.recipe, name)) for name, words in shape]
    known = [words.format(value) for words, value in values if isinstance(value, int)]
    return " · ".join(["GPT", ", ".join(known)] if known else ["GPT"])


def _lead(record: Record) -> Markup:
    """How the run stands, on what it ran, and since when."""
    environment = record.environment
    started_at = environment.get("started_at")
    words = [
        element("span", state_sentence(record.status), "state"),
        *(environment.get(name) for name in ("device_name", "precision")),
        f"started {_readable_time(str(started_at))}" if started_at else None,
    ]
    return Markup(" · ".join(element("span", word, "together") for word in words if word))


def _readable_time(text: str) -> str:
    """An ISO time to the minute, with its zone; any other text as it is."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def _notices(record: Record) -> Markup:
    """What a reader must know before believing a number: damaged files, losses that are not finite."""
    notices = list(record.problems)
    broken = record.metrics["step"][~np.isfinite(record.metrics["loss"])]
    if broken.size:
        steps = "step" if broken.size == 1 else "steps"
        notices.append(
            f"the training loss was not finite at {broken.size:,} {steps}, first at step {broken[0]:,.0f}"
        )
    notices += [
        f"steps {line.get('first_bad_step')} to {line.get('last_bad_step')} went wrong: the run went back to "
        f"step {line['step'] - 1:,} and on without their {line.get('rows')} rows"
        for line in record.rollbacks
    ]
    skipped = np.count_nonzero(~np.isfinite(record.metrics["grad_norm"]))
    if skipped and find_setting(record.recipe, "precision") == "fp16":
        steps = "step" if skipped == 1 else "steps"
        notices.append(f"{skipped:,} {steps} skipped: float16 overflow")
    if record.verdict is not None and not record.verdict.is_on_track:
        notices += map(_capitalised, record.verdict.sentences())
    return notice(notices)


def _headline(record: Record) -> Markup:
    """The handful of numbers one looks for first."""
    entries = [*_loss_figures(record), *_place_figure(record), *_speed_figures(record)]
    items = (f"<div>{element('dt', label)}{element('dd', value)}</div>" for label, value in entries)
    return Markup('<dl class="figures">\n' + "\n".join(items) + "\n</dl>") if entries else Markup("")


def _loss_figures(record: Record) -> Iterator[tuple[str, str]]:
    evaluation = record.evaluations[-1] if record.evaluations else {}
    if evaluation:
        at = "" if evaluation["step"] == record.status.step else f", at step {evaluation['step']:,}"
        yield f"validation loss, nats per token{at}", significant(evaluation["loss"])
    elif record.steps:
        yield "training loss, nats per token (no evaluation yet)", significant(record.smoothed_loss()[-1])
    if is_finite(evaluation.get("perplexity")):
        yield "perplexity per token", significant(evaluation["perplexity"])
    if is_finite(evaluation.get("bits_per_byte")):
        yield "bits per byte of text", significant(evaluation["bits_per_byte"])


def _place_figure(record: Record) -> Iterator[tuple[str, str]]:
    """One word, and beside what."""
    if (verdict := record.verdict) is not None:
        yield f"beside {verdict.band.source}", verdict.word


def _capitalised(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}"


def _speed_figures(record: Record) -> Iterator[tuple[str, str]]:
    metrics = record.metrics
    if record.steps:
        yield "tokens seen", short(metrics["tokens"][-1])
    if (speed := median(metrics["tokens_per_second"])) is not None:
        yield "tokens per second, median", short(speed)
    if (share := median(metrics["mfu"])) is not None:
        yield "MFU, median (6N + 12LCT)", f"{share:.1%}"
    if (share := median(metrics["mfu_executed"])) is not None:
        yield "MFU, median (executed FLOPs)", f"{share:.1%}"
    if np.isfinite(metrics["milliseconds"]).any():
        yield "spent in training steps", duration(float(np.nansum(metrics["milliseconds"])) / 1000)
    if is_finite(record.environment.get("parameters")):
        yield "parameters", short(record.environment["parameters"])


def compression(record: Record) -> Markup:
    """Ours among the general compressors, as bars; nothing if either side is missing."""
    measured = record.compression.get("bits_per_byte")
    evaluation = record.evaluations[-1] if record.evaluations else {}
    ours = evaluation.get("bits_per_byte")
    if not isinstance(measured, dict) or not is_finite(ours):
        return Markup("")
    bars = {str(name): float(bits) for name, bits in measured.items() if is_finite(bits)}
    longest = max([ours, *bars.values()])
    rows = sorted(
        [*((bits, name, "") for name, bits in bars.items()), (float(ours), record.status.name, "ours")]
    )
    bars_drawn = "\n".join(_bar(*row, longest) for row in rows[::-1])
    return section(
        "As a compressor",
        paragraph(
            "Bits needed for each byte of the validation text; fewer is better. The model's own size is not "
            f"counted.{_unequal_texts(record.compression.get('bytes'), evaluation.get('evaluated_bytes'))}",
            "quiet",
        ),
        Markup(f'<table class="bars"><tbody>\n{bars_drawn}\n</tbody></table>'),
    )


def _unequal_texts(theirs: object, ours: object) -> str:
    """A sentence if the compressors and the model were not given the same number of bytes."""
    if not is_finite(theirs) or not is_finite(ours) or theirs == ours:
        return ""
    return f" The compressors were given {short(theirs)} bytes of it, the model {short(ours)}."


def _bar(bits: float, name: str, css: str, longest: float) -> str:
    share = bits / longest if longest > 0 else 0
    return (
        f'<tr class="{css}">{element("th", name)}<td><div class="bar">'
        f'<span style="width: calc((100% - 4rem) * {share:.4f})"></span>{bits:.3f}</div></td></tr>'
    )
