"""The Python interface: `load`, `prepare`, `train`, and the objects they return.

import overnight

model = overnight.load("runs/quickstart")
print(model.generate("The value of", max_new_tokens=50))
run = overnight.train("shakespeare-char-cpu", data="data/my-notes", total_steps=500)
run.metrics
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overnight.config import nearest
from overnight.conversion.open_model import OpenedModel, open_model
from overnight.evaluation import EvaluateConfig
from overnight.evaluation.results import EvaluationResults, evaluate_opened
from overnight.generation import SamplingConfig
from overnight.generation.generate import Decoding, stream_text
from overnight.preparation.prepare import prepare_folder
from overnight.preparation.prepare_config import PrepareConfig, output_folder
from overnight.recipe import Recipe, load_recipe, with_settings
from overnight.report.page import write_report
from overnight.run import train as train_module
from overnight.run.resume import load_resumed
from overnight.run_directory import RunDirectory


class Model:
    """A model and its tokenizer. `gpt` is the `torch.nn.Module`, in evaluation mode."""

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened
        self.gpt, self.tokenizer = opened.model, opened.tokenizer

    def __repr__(self) -> str:
        parameters = self.gpt.config.parameter_count()
        return f"<Model {self._opened.origin}, {parameters:,} parameters, tokenizer {self.tokenizer.name}>"

    def generate(self, prompt: str = "", **options: Any) -> str:
        """The continuation of `prompt`; the options are those of `stream`."""
        return "".join(self.stream(prompt, **options))

    def stream(
        self, prompt: str = "", *, max_new_tokens: int = 128, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """The continuation of `prompt` in pieces of text, as they are generated.

        It ends after `max_new_tokens`, at the end of a document, or before a text of `stop`. `sampling` is
        temperature, top_k, top_p and seed, as in `SamplingConfig`. Raises ValueError for invalid values and
        for a prompt that does not fit into the context.
        """
        _check_names("stream", sampling, SamplingConfig)
        settings = SamplingConfig(**sampling)
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            sampling=settings,
            stop=tuple(stop),
            end_ids=self._opened.end_ids,
        )
        return stream_text(self.gpt, self.tokenizer, prompt, decoding)

    @torch.no_grad()
    def logits(self, text: str | Tensor) -> Tensor:
        """Logits (T, V) after each token of a text, or (B, T, V) of ids (B, T); float32."""
        if isinstance(text, Tensor):
            return self.gpt(text)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        ids = torch.tensor([self.tokenizer.encode(text)])
        return self.gpt(ids)[0]  # type: ignore[no-any-return]

    def evaluate(self, tasks: Sequence[str] = ("validation",), **options: Any) -> EvaluationResults:
        """Loss on the held-out text and scores of tasks, with confidence intervals; see `EvaluateConfig`.

        `options` are data, examples, task_files, stride, evaluation_tokens and precision, as in `overnight
        evaluate`.
        """
        _check_names("evaluate", options, EvaluateConfig)
        config = EvaluateConfig(model=str(self._opened.origin), tasks=tuple(tasks), **options)
        return evaluate_opened(self._opened, config)


class Run:
    """A run directory: its metrics, its report, its model."""

    def __init__(self, path: Path | str) -> None:
        self.directory = RunDirectory(path)

    def __repr__(self) -> str:
        return f"<Run {self.directory.path}>"

    @property
    def metrics(self) -> Any:
        """One row for each step: a pandas DataFrame where pandas is installed, else a list of dicts."""
        return _table(self.directory.read_metrics())

    @property
    def evaluations(self) -> Any:
        """One row for each evaluation, like `metrics`."""
        return _table(self.directory.read_events("evaluations"))

    @property
    def model(self) -> Model:
        """The model of the newest checkpoint."""
        return load(str(self.directory.path))

    def report(self) -> Path:
        """Write report.html; returns its path."""
        return write_report(self.directory.path)


def load(name: str | Path) -> Model:
    """Open a run, a checkpoint, a Hugging Face folder or name, or a nanoGPT .pt file, on the CPU."""
    return Model(open_model(str(name)))


def prepare(source: str | Path, **options: Any) -> Path:
    """Prepare text; returns the folder of shards. The options are those of `overnight prepare`."""
    _check_names("prepare", options, PrepareConfig)
    config = PrepareConfig(source=str(source), **options)
    return prepare_folder(config) or output_folder(config)


def train(recipe: str | Recipe = "quickstart", *, resume: str | Path | None = None, **settings: Any) -> Run:
    """Train a recipe, changed by `settings` (n_layer=4, data=...), into runs/<run_name>; or `resume` a run.

    Raises ValueError for invalid settings, and KeyboardInterrupt if the run was stopped and saved.
    """
    if resume is not None:
        asked, path = with_settings(load_resumed(Path(resume)), **settings), Path(resume)
    else:
        asked = with_settings(load_recipe(recipe) if isinstance(recipe, str) else recipe, **settings)
        path = Path("runs") / asked.run_name
    train_module.train_recipe(asked, RunDirectory(path), resume=resume is not None)
    return Run(path)


def _check_names(function: str, options: dict[str, Any], config: type) -> None:
    """Raise ValueError for an option that `config` does not have."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in options:
        if name not in known:
            raise ValueError(f"{function} has no option {name}{nearest(name, known)}")


def _table(rows: list[dict[str, Any]]) -> Any:
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        return rows
    return pandas.DataFrame(rows)
