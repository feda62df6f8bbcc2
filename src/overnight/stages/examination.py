"""What `overnight doctor` has before it: the recipe, its text, a small likeness, and what to do with them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.checks import agreement, course, learning, resources, saving, team, texts, writing
from overnight.checks.check import Finding, SetUp, skipped
from overnight.data.shards import Manifest, read_manifest
from overnight.hardware import native_precision
from overnight.model.config import ModelConfig
from overnight.parallel import can_compile
from overnight.report.words import duration
from overnight.stages import foresight, pretrain, specimen
from overnight.stages.at_hand import TextAtHand, find_texts_at_hand
from overnight.stages.doctor_page import COLUMNS
from overnight.stages.forecast import Text, find_sizes, find_text
from overnight.stages.foresight import Foresight
from overnight.stages.models import OpenedModel, open_model
from overnight.stages.recipe import Recipe
from overnight.stages.specimen import Specimen
from overnight.world import ALONE, World, open_world

if TYPE_CHECKING:
    from overnight.stages.doctor import DoctorConfig

SOME_CHARACTERS = 322  # tiny shakespeare's vocabulary, where the text's own can't be known yet
OfText = Callable[[Path, Manifest], Finding]


@dataclass(frozen=True)
class Examination:
    """Everything that is looked at; what takes time to make is made once, when it is first wanted."""

    config: DoctorConfig
    name: str
    recipe: Recipe
    scratch: Path
    world: World
    texts: list[TextAtHand]
    text: Text
    sizes: ModelConfig
    reference: OpenedModel | None

    def checks(self) -> dict[str, Callable[[], Finding]]:
        """What is to be done, by name."""
        thorough = self.config.thorough
        return {
            "shards": self._shards,
            "tokenizer": lambda: self._of_texts(texts.check_tokenizer),
            "boundaries": lambda: self._of_texts(
                lambda at, manifest: texts.check_boundaries(at, manifest, thorough=thorough)
            ),
            "disjoint": lambda: self._of_texts(
                lambda at, manifest: texts.check_disjoint(at, manifest, thorough=thorough)
            ),
            "contamination": self._contamination,
            "initial-loss": lambda: learning.check_initial_loss(self._build()),
            "gradients": lambda: learning.check_gradients(self._build()),
            "causality": lambda: writing.check_causality(self._build()),
            "rows": self._rows,
            "accumulation": lambda: learning.check_accumulation(self._build),
            "overfit": lambda: learning.check_overfit(self._build()),
            "generation": lambda: writing.check_generation(self._build()),
            "checkpoint": lambda: saving.check_saving(self._build, self.scratch / "checkpoints"),
            "precision": self._precision,
            "compiled": self._compiled,
            "processes": self._processes,
            "reference": self._reference,
            "schedule": self._schedule,
            "learning-rate": lambda: course.check_peak(
                self.recipe.optimizer.peak_learning_rate, self.sizes.n_embd, begins_anew=self._begins_anew
            ),
            "memory": lambda: resources.check_memory(
                self.foresight.needed_bytes, self.foresight.usable_bytes, self.foresight.device_name
            ),
            "disk": lambda: resources.check_disk(self.foresight.disk_bytes, self.foresight.free_bytes),
            "time": self._time,
        }

    def describe(self) -> list[str]:
        """What is looked at, in a few lines."""
        less = self.specimen.less
        where = f"{self.name} on {self.world.device}"
        words = f"the model is tried with {less}; memory, disk and time are the whole run's"
        return [where, *textwrap.wrap(words, COLUMNS)] if less else [where]

    @cached_property
    def specimen(self) -> Specimen:
        """The recipe made small: on a piece of its own text, or, where that can't be read, on made-up ids."""
        folders = [at_hand.folder for at_hand in self.texts if at_hand.folder is not None]
        for folder in folders[:1]:
            try:
                specimen.cut_text(folder, self.scratch / "piece")
                found = self._shrink(self.scratch / "piece")
                found.build_job()
                return found
            except (ValueError, OSError):  # what is wrong with it is for the checks of the text to say
                continue
        specimen.make_text(self.scratch / "made-up", self.text.vocab_size)
        return self._shrink(self.scratch / "made-up")

    @cached_property
    def foresight(self) -> Foresight:
        """The recipe with everything decided, and what it needs."""
        return foresight.foresee(self.recipe, self.sizes, self.text, self.world.device)

    def _shrink(self, folder: Path) -> Specimen:
        small, less = specimen.shrink(self.recipe, self.sizes, folder, self.world.device)
        return Specimen(small, self.world, less)

    def _build(self, **compute: object) -> SetUp:
        return self.specimen.build(**compute)

    @property
    def _begins_anew(self) -> bool:
        return self.recipe.start_from is None

    # ------------------------------------------------------------ each that takes more than a line

    def _shards(self) -> Finding:
        missing = "; ".join(at_hand.why_not for at_hand in self.texts if at_hand.folder is None)
        found = self._of_texts(lambda at, _: texts.check_shards(at, thorough=self.config.thorough))
        return dataclasses.replace(found, cause=found.cause if found.passed is False else missing)

    def _of_texts(self, look: OfText) -> Finding:
        """One finding about all texts: the first that failed, or the first there is."""
        found = []
        for at_hand in self.texts:
            if at_hand.folder is None:
                found.append(skipped("there are no shards here to look at"))
                continue
            finding = look(at_hand.folder, read_manifest(at_hand.folder))
            if len(self.texts) > 1:
                finding = dataclasses.replace(finding, cause=f"{at_hand.folder}: {finding.cause}")
            found.append(finding)
        return min(found, key=lambda finding: {False: 0, True: 1, None: 2}[finding.passed])

    def _contamination(self) -> Finding:
        files, thorough = self.config.benchmarks, self.config.thorough
        if not files:
            return skipped("no benchmark's file was given: --benchmarks FILE ...")
        return self._of_texts(
            lambda at, manifest: texts.check_contamination(at, manifest, files, thorough=thorough)
        )

    def _rows(self) -> Finding:
        seen, validation = self.foresight, self.text.validation_tokens
        steps = seen.recipe.schedule.total_steps
        assert steps is not None
        trained = None if self.text.tokens is None else self.text.tokens - (validation or 0)
        return texts.check_rows(self._build(), seen.plan.tokens_before(steps), trained)

    def _precision(self) -> Finding:
        asked = self.recipe.compute.precision
        if asked == "fp32":
            return skipped("the recipe computes in float32 throughout")
        native = native_precision(self.world.device)
        return agreement.check_precision(self._build, asked or ("bf16" if native == "fp32" else native))

    def _compiled(self) -> Finding:
        if self.recipe.compute.compile is False:
            return skipped("the recipe does not compile")
        if not can_compile() or self.world.device == "mps":
            return skipped("torch.compile finds no C++ compiler here, or can't be used on this device")
        return agreement.check_compiled(self._build)

    def _processes(self) -> Finding:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_gloo_available()):
            return skipped("this torch has no gloo, by which processes on a CPU talk")
        small = self.specimen.recipe
        small = dataclasses.replace(small, compute=dataclasses.replace(small.compute, device="cpu"))

        def train_in_two() -> agreement.Steps:
            folder = self.scratch / "two"
            folder.mkdir()
            specimen.write_task(small, folder)
            team.run_in_two(specimen.IN_PROCESS, [str(folder)], folder / "logs")
            return specimen.read_steps(folder)

        return agreement.check_processes(lambda: specimen.train_steps(small, ALONE), train_in_two)

    def _reference(self) -> Finding:
        if self.reference is None:
            return skipped("no model was given: --against gpt2, or a Hugging Face folder")
        return writing.check_reference(self.reference.model, self.reference.origin)

    def _schedule(self) -> Finding:
        """Of the whole run, as `build_training` makes it."""
        seen = self.foresight
        whole = dataclasses.replace(self.specimen.build_job(), recipe=seen.recipe, plan=seen.plan)
        steps = seen.recipe.schedule.total_steps
        assert steps is not None
        rate = pretrain.build_training(whole).learning_rate
        return course.check_schedule(rate, steps, seen.recipe.schedule, begins_anew=self._begins_anew)

    def _time(self) -> Finding:
        seconds, rests_on = foresight.predict_time(self.foresight, self.text)
        return resources.check_time(seconds, duration(seconds), rests_on)


def open_examination(config: DoctorConfig, name: str, scratch: Path) -> Examination:
    """Find text, sizes and device. Raises ValueError for what `overnight train` would refuse as well."""
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})
    world = open_world(recipe.compute.device)
    reference = None
    if config.against is not None:
        reference = open_model(config.against)
        if not (reference.origin / "config.json").is_file():
            raise ValueError(f"against={config.against} is a run of ours: give a Hugging Face folder or name")
    at_hand = find_texts_at_hand(recipe.data, name)
    guessed = SOME_CHARACTERS if recipe.data.tokenizer == "characters" else None
    text = find_text(recipe.data, recipe.model.vocab_size or guessed)
    return Examination(
        config=config,
        name=name,
        recipe=recipe,
        scratch=scratch,
        world=world,
        texts=at_hand,
        text=text,
        sizes=find_sizes(recipe, text.vocab_size),
        reference=reference,
    )
