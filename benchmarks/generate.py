"""How fast GPT-2 124M writes on the CPU: overnight beside Hugging Face Transformers, both with a cache.

    python benchmarks/generate.py --repeats 3

Random weights, the same on both sides, float32; prompts of 32 random ids, 128 new ones. The two take turns
in one process. Greedy completions are compared, too: they are to be the same ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from measure import Report, interleave, model_name, paired_ratio, run_plainly, spread, timed
from overnight.model.config import PRESETS, ModelConfig

OURS, THEIRS = "overnight", "transformers"
HEADINGS = ("side", "median ms", "min", "max", "tokens/s", f"times as fast as {THEIRS}")

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


def build_ours(config: ModelConfig, seed: int = 1337) -> Any:
    """Our model as `overnight generate` has it when it begins to write."""
    from overnight.generate import arrange_for_decoding
    from overnight.model.gpt import GPT
    from overnight.model.initialization import initialize

    model = GPT(config)
    initialize(model, seed)
    arrange_for_decoding(model)
    return model.eval()


def build_theirs(config: ModelConfig, ours: Any) -> Any:
    """Transformers' GPT2LMHeadModel with the weights of `ours`. Raises ValueError if it isn't installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ValueError("transformers is not installed; pip install transformers") from None
    shape = ("n_layer", "n_head", "n_embd", "vocab_size")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in shape}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id"))  # so that no id ends a completion
    model: Any = GPT2LMHeadModel(GPT2Config(n_positions=config.context_length, **sizes))
    weights = {}
    for name, weight in ours.weights().items():
        is_conv1d = ".c_" in name and name.endswith(".weight")  # which keeps a matrix as (in, out)
        weights[f"transformer.{name}"] = weight.T if is_conv1d else weight
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found
    assert found.missing_keys == ["lm_head.weight"], found  # tied to the embedding
    return model.eval()


def write_ours(model: Any, prompts: Completions, setting: Setting) -> Completions:
    """The new ids of each prompt, by overnight."""
    from overnight.generate import Decoding, generate
    from overnight.sampling import SamplingConfig

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


def draw_prompts(rows: int, length: int, vocab_size: int) -> Completions:
    """Random ids, always the same."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prompts: Completions = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    return prompts


def measure(options: argparse.Namespace) -> Report:
    """Write with both in turn, setting by setting."""
    config = dataclasses.replace(PRESETS["gpt2-124m"], n_layer=options.layers)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    if options.prompt + options.new > config.context_length:
        raise ValueError(
            f"--prompt and --new together are more than the {config.context_length} ids of a GPT-2"
        )
    ours = build_ours(config)
    theirs = build_theirs(config, ours)
    rows, measured, notes = [], {}, []
    for setting in settings_of(options):
        prompts = draw_prompts(setting.rows, options.prompt, config.vocab_size or 0)
        sides: dict[str, Callable[[], Completions]] = {
            OURS: partial(write_ours, ours, prompts, setting),
            THEIRS: partial(write_theirs, theirs, prompts, setting),
        }
        written = {name: side() for name, side in sides.items()}  # the warm-up
        for name, completions in written.items():
            assert [len(ids) for ids in completions] == [setting.new] * setting.rows, name
        if setting.top_k is None:
            same = sum(a == b for a, b in zip(written[OURS], written[THEIRS], strict=True))
            notes.append(f"{setting.name}: {same} of {setting.rows} completions are the same ids.")
        times = interleave({name: timed(side) for name, side in sides.items()}, options.repeats)
        rows += table_rows(setting, times)
        measured[setting.name] = times
    return Report(
        title=f"{model_name(config)} writes on the CPU, float32",
        headings=HEADINGS,
        rows=rows,
        measured=measured,
        settings={name: getattr(options, name) for name in ("prompt", "new", "layers", "repeats")},
        notes=notes,
    )


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Every batch size, greedily and drawn from the 50 likeliest."""
    return [
        Setting(rows=rows, new=options.new, top_k=top_k) for rows in options.batch for top_k in (None, 50)
    ]


def table_rows(setting: Setting, times: dict[str, list[float]]) -> list[list[str]]:
    """One row for each side."""
    tokens = setting.rows * setting.new
    return [
        [
            f"{setting.name}: {name}",
            *spread(each),
            f"{tokens / statistics.median(each) * 1e3:,.1f}",
            f"{paired_ratio(each, times[THEIRS]):.2f}",
        ]
        for name, each in times.items()
    ]


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="completions at once")
    parser.add_argument("--prompt", type=int, default=32, help="ids of a prompt")
    parser.add_argument("--new", type=int, default=128, help="ids of a completion")
    parser.add_argument("--layers", type=int, default=12, help="fewer make a quick try")
    parser.add_argument("--repeats", type=int, default=5, help="measured completions of each side")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = read_options(sys.argv[1:])
    sys.exit(run_plainly(lambda: measure(chosen), as_json=chosen.json))
