"""Paired ablations: recipes that differ in named settings, trained on equal text from equal seeds.

arms        the recipes that are compared; what may not differ between them
campaign    their runs: begun, resumed, recognised; tuning
paired      Student's interval of paired differences, verdicts
timing      steps of two arms, timed in turn
results     the finished runs to one record
page        text, JSON and HTML
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction

from overnight.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class AblationConfig(Recipe):
    """A recipe with its options, which apply to all arms, and what it is compared with."""

    baseline: str | None = None
    """Compare RECIPE with this recipe, by name or .toml file."""
    leave_out: Annotated[tuple[str, ...], UseAppendAction] = ()
    """Settings to reset to GPT-2's values, each in its own arm: positions,qk_norm. Joined by + they are one
    arm: positions+rotary_base. RECIPE is the baseline."""
    add: Annotated[tuple[str, ...], UseAppendAction] = ()
    """SETTING=VALUE, in its own arm; may be repeated. Settings joined by + are one arm:
    optimizer=muon+matrix_learning_rate=0.03. RECIPE is the baseline."""
    control: bool = False
    """Train the baseline a second time, as an arm (A/A test): there is no true difference."""
    tune: Annotated[tuple[str, ...], UseAppendAction] = ()
    """SETTING=VALUE,VALUE,...: train each arm with each value, on a seed that is not compared, and choose the
    value with the lowest loss. May be repeated for other settings: all combinations are trained."""
    seeds: str = "5"
    """Number of seeds, counted from --seed; or the seeds themselves: 1,2,3."""
    step_times: bool = True
    """Measure the time of a step of each arm after training, in turn with the baseline."""
    json: bool = False
    """Print one JSON object to standard output, and the table to standard error."""
