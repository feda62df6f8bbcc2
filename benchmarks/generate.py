"""How fast GPT-2 124M writes on the CPU: overnight beside Hugging Face Transformers and ctranslate2.

    python benchmarks/generate.py --new 256

Random weights, the same on all sides, each in every precision that it has here; prompts of 32 random ids.
All have a cache, and they take turns in one process. The greedy completions of overnight and Transformers in
float32 are compared, too: they are to be the same ids. ctranslate2 is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
from overnight.bench.worker import SEED
from overnight.model.model_config import ModelConfig
from peers import build_transformers

OURS, THEIRS, CTRANSLATE2 = "overnight", "transformers", "ctranslate2"
PRECISIONS = {
    OURS: ("fp32", "fp16", "bf16", "int8"),
    THEIRS: ("fp32", "bf16"),  # a CPU's float16 is emulated there
    CTRANSLATE2: ("int8",),
}
HEADINGS = ("side", "median ms", "min", "max", "tokens/s", f"times as fast as {THEIRS}' best")
WARM_UP_IDS = 8

Completions = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing to measure."""

    rows: int
    new: int
    top_k: int | None
    """None: always the likeliest id."""

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"batch {self.rows}, {'greedy' if self.top_k is None else f'top-k {self.top_k}'}"


Writer = Callable[[Completions, Setting], Completions]


def prepare_ours(model: Any, precision: Any) -> Any:
    """A copy of our model as `overnight generate` has it when it begins to write."""
    from overnight.generation.quantize import prepare_for_generation

    prepared = copy.deepcopy(model)
    prepare_for_generation(prepared, precision)
    return prepared


def build_ctranslate2(theirs: Any, precision: str) -> Any:
    """ctranslate2's generator with the weights of Transformers' model. Raises ImportError without it."""
    import torch

    ctranslate2 = importlib.import_module("ctranslate2")
    loader = importlib.import_module("ctranslate2.converters.transformers").GPT2Loader()
    model = loader.get_model_spec(copy.deepcopy(theirs))  # which is then quantised in place
    model.register_vocabulary([str(number) for number in range(theirs.config.vocab_size)])
    model.config.bos_token = model.config.eos_token = model.config.unk_token = "0"
    model.validate()
    model.optimize(quantization=precision)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return ctranslate2.Generator(folder, compute_type=precision, intra_threads=torch.get_num_threads())


def write_ours(model: Any, prompts: Completions, setting: Setting) -> Completions:
    """The new ids of each prompt, by overnight."""
    from overnight.generation import SamplingConfig
    from overnight.generation.generate import Decoding, generate

    sampling = SamplingConfig(temperature=0.0 if setting.top_k is None else 1.0, top_k=setting.top_k)
    return generate(model, prompts, Decoding(max_new_tokens=setting.new, sampling=sampling))


def write_theirs(model: Any, prompts: Completions, setting: Setting) -> Completions:
    """The new ids of each prompt, by Transformers."""
    import torch

    ids = torch.tensor(prompts)
    options: dict[str, Any] = {"do_sample": False}
    if setting.top_k is not None:
        options = {"do_sample": True, "top_k": setting.top_k, "temperature": 1.0}
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=setting.new,
        use_cache=True,
        pad_token_id=0,
        **options,
    )
    new: Completions = written[:, ids.shape[1] :].tolist()
    return new


def write_ctranslate2(generator: Any, prompts: Completions, setting: Setting) -> Completions:
    """The new ids of each prompt, by ctranslate2."""
    written = generator.generate_batch(
        [[str(number) for number in ids] for ids in prompts],
        max_length=setting.new,
        min_length=setting.new,
        sampling_topk=setting.top_k or 1,
        include_prompt_in_result=False,
        end_token=[],
    )
    return [row.sequences_ids[0] for row in written]


def draw_prompts(rows: int, length: int, vocab_size: int) -> Completions:
    """Random ids, always the same."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prompts: Completions = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    return prompts


def build_writers(config: ModelConfig, chosen: Sequence[str]) -> tuple[dict[str, Writer], list[str]]:
    """Each side's writer by its name and precision, and sentences about those that can't run."""
    import torch

    from overnight.generation.quantize import generation_precisions
    from overnight.model.gpt import GPT

    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed; pip install transformers")
    ours = GPT(config, seed=SEED).eval()
    theirs = build_transformers(ours).model.eval()
    writers: dict[str, Writer] = {}
    left_out = []
    here = generation_precisions("cpu")
    for precision in PRECISIONS[OURS]:
        if precision in here:
            writers[f"{OURS}, {precision}"] = partial(write_ours, prepare_ours(ours, precision))
        else:
            left_out.append(f"{OURS}, {precision} is left out: this CPU does not compute it.")
    if CTRANSLATE2 in chosen:
        for precision in PRECISIONS[CTRANSLATE2]:
            try:
                generator = build_ctranslate2(theirs, precision)
                writers[f"{CTRANSLATE2}, {precision}"] = partial(write_ctranslate2, generator)
            except ImportError:
                left_out.append(f"{CTRANSLATE2} is left out: it is not installed; pip install ctranslate2.")
    writers[f"{THEIRS}, fp32"] = partial(write_theirs, theirs)
    if "bf16" in here:
        writers[f"{THEIRS}, bf16"] = partial(write_theirs, copy.deepcopy(theirs).to(torch.bfloat16))
    return {name: writer for name, writer in writers.items() if name.split(",")[0] in chosen}, left_out


def report(options: argparse.Namespace) -> measure.Report:
    """Write with all sides in turn, setting by setting."""
    config = measure.gpt2_124m(n_layer=options.layers)
    if options.prompt + options.new > config.context_length:
        raise ValueError(f"--prompt plus --new exceed the {config.context_length} ids of a GPT-2")
    writers, notes = build_writers(config, options.sides)
    rows, measured = [], {}
    for setting in settings_of(options):
        prompts = draw_prompts(setting.rows, options.prompt, config.vocab_size or 0)
        for writer in writers.values():
            writer(prompts, dataclasses.replace(setting, new=min(WARM_UP_IDS, setting.new)))
        sides = {name: partial(write, writer, prompts, setting) for name, writer in writers.items()}
        written = measure.interleave(sides, options.repeats)
        times = {name: [milliseconds for milliseconds, _ in each] for name, each in written.items()}
        completions = {name: each[0][1] for name, each in written.items()}
        rows += table_rows(setting, times)
        notes += notes(setting, times, completions)
        measured[setting.name] = times
    return measure.Report(
        title=f"{measure.model_name(config)} writes on the CPU",
        headings=HEADINGS,
        rows=rows,
        measured=measured,
        settings={name: getattr(options, name) for name in ("prompt", "new", "layers", "repeats")},
        notes=notes,
    )


def write(writer: Writer, prompts: Completions, setting: Setting) -> tuple[float, Completions]:
    """Milliseconds, and the completions, which have their full length."""
    started_at = time.perf_counter()
    completions = writer(prompts, setting)
    milliseconds = (time.perf_counter() - started_at) * 1e3
    assert [len(ids) for ids in completions] == [setting.new] * setting.rows, setting
    return milliseconds, completions


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Every batch size, greedily and drawn from the likeliest."""
    return [
        Setting(rows=rows, new=options.new, top_k=top_k)
        for rows in options.batch
        for top_k in (None, options.top_k)
    ]


def find_best(times: dict[str, list[float]], side: str) -> str | None:
    """The name of a side in its quickest precision; None if it is not there."""
    names = [name for name in times if name.split(",")[0] == side]
    return min(names, key=lambda name: statistics.median(times[name])) if names else None


def table_rows(setting: Setting, times: dict[str, list[float]]) -> list[list[str]]:
    """One row for each side."""
    tokens = setting.rows * setting.new
    reference = find_best(times, THEIRS)
    return [
        [
            f"{setting.name}: {name}",
            *measure.spread(each),
            f"{tokens / statistics.median(each) * 1e3:,.1f}",
            "" if reference is None else f"{measure.paired_ratio(each, times[reference]):.2f}",
        ]
        for name, each in times.items()
    ]


def notes(setting: Setting, times: dict[str, list[float]], completions: dict[str, Completions]) -> list[str]:
    """Best beside best, int8 beside int8, and whether the same ids were written."""
    pairs = [(find_best(times, OURS), find_best(times, THEIRS)), (f"{OURS}, int8", f"{CTRANSLATE2}, int8")]
    notes = [
        f"{setting.name}: {ours} is {measure.times_as_fast(times[ours], times[theirs])} as {theirs}."
        for ours, theirs in pairs
        if ours in times and theirs in times
    ]
    ours, theirs = (completions.get(f"{side}, fp32") for side in (OURS, THEIRS))
    if setting.top_k is None and ours and theirs:
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        notes.append(f"{setting.name}: {same} of {setting.rows} completions in fp32 are the same ids.")
    return notes


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measure.command_line(__doc__, "layers", repeats=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="completions at once")
    parser.add_argument("--prompt", type=int, default=32, help="ids of a prompt")
    parser.add_argument("--new", type=int, default=64, help="ids of a completion")
    parser.add_argument(
        "--top-k", type=int, default=200, help="draw from this many ids, after the greedy round"
    )
    parser.add_argument("--sides", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    return parser.parse_args(words)


if __name__ == "__main__":
    measure.run_program(read_options, report)
