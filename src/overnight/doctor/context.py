"""What the checks of a recipe need, and which function does which check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch.distributed as dist

from overnight.conversion.open_model import open_model
from overnight.data.shards import Manifest, read_manifest
from overnight.distributed.world import SINGLE_PROCESS, open_world
from overnight.doctor import DoctorConfig, data_checks, generation_checks, model_checks, run_checks
from overnight.doctor.check import CheckResult, skipped
from overnight.doctor.local_datasets import find_local_datasets
from overnight.doctor.tiny_run import TinyRun, prepare_made_up_text, prepare_piece, shrink
from overnight.hardware import native_precision
from overnight.planning import PlanConfig
from overnight.planning.command import estimate_plan, planned_recipe
from overnight.planning.estimate import find_token_counts, model_config_of
from overnight.planning.plan import Plan
from overnight.run.setup import RunSetup
from overnight.training.compute import can_compile
from overnight.training.schedule import Schedule

UNKNOWN_CHARACTERS = 322  # Tiny Shakespeare's and more, where a text's own characters are not counted yet


class DoctorContext:
    """The recipe, its text, its plan and its tiny run, each made once, when it is first needed.

    Raises ValueError for what `overnight train` would refuse as well.
    """

    def __init__(self, config: DoctorConfig, name: str, scratch: Path) -> None:
        self.config, self.name, self.scratch = config, name, scratch
        self.recipe = planned_recipe(config)
        self.world = open_world(self.recipe.compute.device)
        self.baseline = None if config.baseline is None else open_model(config.baseline)
        if self.baseline is not None and not (self.baseline.origin / "config.json").is_file():
            raise ValueError(f"baseline={config.baseline} is not a Hugging Face folder or name")
        self.datasets = find_local_datasets(self.recipe.data, name)
        guessed = UNKNOWN_CHARACTERS if self.recipe.data.tokenizer == "characters" else None
        self.text = find_token_counts(self.recipe.data, self.recipe.model.vocab_size or guessed)
        self.sizes = model_config_of(self.recipe, self.text.vocab_size)

    @cached_property
    def tiny_run(self) -> TinyRun:
        """The recipe made small: on a piece of its own text or, where that can't be read, on made-up text."""
        folders = [dataset.folder for dataset in self.datasets if dataset.folder is not None]
        if folders:
            try:
                piece = prepare_piece(folders[0], self.scratch / "piece")
                found = shrink(self.recipe, self.sizes, piece, self.world)
                found.build()
                return found
            except (ValueError, OSError):  # the checks of the text report what is wrong with it
                pass
        made_up = prepare_made_up_text(self.scratch / "made-up")
        return shrink(self.recipe, self.sizes, made_up, self.world, "a made-up text")

    @cached_property
    def plan(self) -> Plan:
        """The plan of the whole run."""
        return estimate_plan(PlanConfig(**vars(self.recipe)), self.name, self.text)

    def checks(self) -> dict[str, Callable[[], CheckResult]]:
        """The function of each check."""
        full, build = self.config.full, self._build
        peak, channels = self.recipe.optimizer.peak_learning_rate, self.sizes.n_embd
        is_pretraining = self.recipe.init_from is None
        return {
            "shards": self._shards,
            "tokenizer": lambda: self._of_texts(data_checks.check_tokenizer),
            "boundaries": lambda: self._of_texts(
                lambda folder, manifest: data_checks.check_boundaries(folder, manifest, full=full)
            ),
            "disjoint": lambda: self._of_texts(
                lambda folder, manifest: data_checks.check_disjoint(folder, manifest, full=full)
            ),
            "contamination": self._contamination,
            "initial-loss": lambda: model_checks.check_initial_loss(build()),
            "gradients": lambda: model_checks.check_gradients(build()),
            "causality": lambda: generation_checks.check_causality(build()),
            "rows": self._rows,
            "accumulation": lambda: model_checks.check_accumulation(self.tiny_run),
            "overfit": lambda: model_checks.check_overfit(build()),
            "generation": lambda: generation_checks.check_generation(build()),
            "checkpoint": lambda: model_checks.check_saving(self.tiny_run, self.scratch / "checkpoints"),
            "precision": self._precision,
            "compiled": self._compiled,
            "processes": self._processes,
            "reference": self._reference,
            "schedule": self._schedule,
            "learning-rate": lambda: run_checks.check_peak(peak, channels, is_pretraining=is_pretraining),
            "memory": lambda: run_checks.check_memory(self.plan),
            "disk": lambda: run_checks.check_disk(self.plan),
            "time": lambda: run_checks.check_time(self.plan),
        }

    def _build(self) -> RunSetup:
        return self.tiny_run.build()

    def _of_texts(self, check: Callable[[Path, Manifest], CheckResult]) -> CheckResult:
        """The result for all texts: the first that failed, else the first that passed."""
        results = []
        for dataset in self.datasets:
            if dataset.folder is None:
                results.append(skipped("there are no shards here to check"))
                continue
            result = check(dataset.folder, read_manifest(dataset.folder))
            if len(self.datasets) > 1:
                result = dataclasses.replace(result, cause=f"{dataset.folder}: {result.cause}")
            results.append(result)
        return min(results, key=lambda result: {False: 0, True: 1, None: 2}[result.passed])

    def _shards(self) -> CheckResult:
        missing = "; ".join(each.missing_reason for each in self.datasets if each.folder is None)
        found = self._of_texts(lambda folder, _: data_checks.check_shards(folder, full=self.config.full))
        return dataclasses.replace(found, cause=found.cause if found.passed is False else missing)

    def _contamination(self) -> CheckResult:
        files, full = self.config.benchmarks, self.config.full
        if not files:
            return skipped("no benchmark file was given: --benchmarks FILE ...")
        return self._of_texts(
            lambda folder, manifest: data_checks.check_contamination(folder, manifest, files, full=full)
        )

    def _rows(self) -> CheckResult:
        text, resolved = self.text, self.plan.resolved
        trained = None if text.tokens is None else text.tokens - (text.validation_tokens or 0)
        run_tokens = resolved.plan.tokens_before(resolved.total_steps)
        return data_checks.check_rows(self._build(), run_tokens, trained)

    def _precision(self) -> CheckResult:
        asked, native = self.recipe.compute.precision, native_precision(self.world.device)
        if asked == "fp32":
            return skipped("the recipe computes in float32 throughout")
        return model_checks.check_precision(self.tiny_run, asked or ("bf16" if native == "fp32" else native))

    def _compiled(self) -> CheckResult:
        if self.recipe.compute.compile is False:
            return skipped("the recipe does not compile")
        if not can_compile() or self.world.device == "mps":
            return skipped("torch.compile finds no C++ compiler here, or can't be used on this device")
        return model_checks.check_compiled(self.tiny_run)

    def _processes(self) -> CheckResult:
        if not (dist.is_available() and dist.is_gloo_available()):
            return skipped("this torch has no gloo, the backend for processes on a CPU")
        on_cpu = TinyRun(self.tiny_run.recipe, SINGLE_PROCESS)
        return model_checks.check_processes(on_cpu, self.scratch / "two")

    def _reference(self) -> CheckResult:
        if self.baseline is None:
            return skipped("no model was given: --baseline gpt2, or a Hugging Face folder")
        return generation_checks.check_reference(self.baseline.model, self.baseline.origin)

    def _schedule(self) -> CheckResult:
        """Of the whole run, not the tiny one."""
        resolved = self.plan.resolved
        config, peak = resolved.recipe.schedule, resolved.recipe.optimizer.peak_learning_rate
        schedule = Schedule(config, peak, resolved.plan, resolved.total_steps)
        return run_checks.check_schedule(
            schedule.learning_rate,
            resolved.total_steps,
            config,
            is_pretraining=self.recipe.init_from is None,
        )
