"""`overnight evaluate` against what a run found out about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.data.prepare import PrepareConfig, prepare
from overnight.parallel import ComputeConfig
from overnight.run_directory import RunDirectory
from overnight.schedule import ScheduleConfig
from overnight.stages import convert, evaluate, pretrain
from overnight.stages.convert import ConvertConfig
from overnight.stages.evaluate import EvaluateConfig
from overnight.stages.recipe import Recipe


@pytest.fixture
def trained(recipe: Callable[..., Recipe], tmp_path: Path) -> RunDirectory:
    """A run of two steps in bf16."""
    directory = RunDirectory(tmp_path / "small")
    compute = ComputeConfig(device="cpu", precision="bf16", compile=False)
    pretrain.run(recipe(compute=compute, schedule=ScheduleConfig(total_steps=2, warmup_steps=0)), directory)
    return directory


@pytest.fixture
def converted(trained: RunDirectory, tmp_path: Path) -> Path:
    """The same model as a Hugging Face folder."""
    return convert.run(ConvertConfig(model=str(trained.path), out=str(tmp_path / "theirs")))


def test_a_run_is_judged_in_its_own_precision_and_any_other_model_in_fp32(
    trained: RunDirectory, converted: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for model, precision in ((trained.path, "bf16"), (converted, "fp32")):
        evaluate.run(EvaluateConfig(model=str(model), data=str(prepared), device="cpu", json=True))
        out, said = capsys.readouterr()
        assert json.loads(out)["precision"] == precision
        assert f"of {prepared}, in {precision}\n" in said
        found[precision] = json.loads(out)["loss"]
    assert found["bf16"] == pytest.approx(trained.read_events("evaluations")[-1]["loss"], rel=1e-9)
    assert found["bf16"] != pytest.approx(found["fp32"], rel=1e-9)
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.01)


def test_text_of_another_tokenizer_is_answered_with_the_folder_of_the_right_one(
    trained: RunDirectory, converted: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"Note {number}: {number} is a number, and this is a sentence.")

    def prepare_with(tokenizer: str, name: str) -> str:
        prepare(
            PrepareConfig(
                source=str(notes), out=str(tmp_path / name), tokenizer=tokenizer, validation_fraction=0.3
            )
        )
        return str(tmp_path / name)

    strange = prepare_with("characters", "strange")
    for model, folder in ((trained.path, trained.tokenizer), (converted, converted)):
        with pytest.raises(ValueError, match=f"--tokenizer {re.escape(str(folder))}$"):
            evaluate.run(EvaluateConfig(model=str(model), data=strange, device="cpu"))
        remedy = prepare_with(str(folder), f"as-{folder.name}")
        evaluate.run(EvaluateConfig(model=str(model), data=remedy, device="cpu"))
