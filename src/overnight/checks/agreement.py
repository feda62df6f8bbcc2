"""Do two ways to compute the same agree? Compiled and not, in 16 bits and 32, by one process and two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from overnight.checks.check import Build, Finding
from overnight.checks.steps import Step, compare_gradients, measure_pass

# Relative, of the loss and of the gradient, by precision. In float32 only sums are in another order. In 16
# bits the loss may be off by a unit or two in the last place (2^-8 of bfloat16, 2^-11 of float16), and the
# gradient by the roundings of a dozen products in a row.
TOLERANCES = {
    "fp32": (1e-5, 1e-3),
    "tf32": (1e-3, 2e-2),
    "fp16": (1e-3, 2e-2),
    "bf16": (4e-3, 1e-1),
}
PROCESSES_TOLERANCE = 1e-4  # of the losses and norms of the first steps; seen: 1e-7


def check_compiled(build: Build) -> Finding:
    """The compiled step's loss and gradient against those of the same step, not compiled."""
    return _compare(
        measure_pass(build(compile=True)),
        measure_pass(build()),
        "fp32",
        "torch.compile makes another computation of the step: try a newer torch, or give --compile False; "
        "if it was changed, look at what build_loss in parallel.py compiles",
    )


def check_precision(build: Build, precision: str) -> Finding:
    """Loss and gradient in the recipe's precision against those in float32."""
    return _compare(
        measure_pass(build(precision=precision)),
        measure_pass(build()),
        precision,
        f"something is rounded to {precision} that must stay in float32: sums, layer norms, the softmax, the "
        "loss (loss.py), the weights themselves (parallel.py); or this device computes it badly: try "
        "--precision fp32",
    )


def _compare(found: Step, expected: Step, precision: str, cause: str) -> Finding:
    loss_bound, gradient_bound = TOLERANCES[precision]
    loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-9)
    gradient = compare_gradients(found.gradients, expected.gradients)
    return Finding(
        passed=loss <= loss_bound and gradient <= gradient_bound,
        measured=f"off by {loss:.1e}, {gradient:.1e}",
        bound=f"{loss_bound:.0e} loss, {gradient_bound:.0e} gradient ({precision})",
        cause=f"losses {found.loss:.5f} and {expected.loss:.5f}, gradient norms {found.grad_norm:.5g} and "
        f"{expected.grad_norm:.5g}: {cause}",
        figures={"loss_relative_difference": loss, "gradient_relative_difference": gradient},
    )


Steps = Sequence[tuple[float, float]]
"""Loss and gradient norm of the first steps."""


def check_processes(train_alone: Callable[[], Steps], train_in_two: Callable[[], Steps]) -> Finding:
    """The first steps of one process against the same steps divided among two, which talk through gloo."""
    alone, together = train_alone(), train_in_two()
    pairs = [
        (mine, theirs)
        for one, two in zip(alone, together, strict=True)
        for mine, theirs in zip(one, two, strict=True)
    ]
    each = [abs(mine - theirs) / max(abs(mine), 1e-9) for mine, theirs in pairs]
    off = max(each) if all(map(math.isfinite, each)) else math.inf
    (loss, norm), (loss_of_two, norm_of_two) = alone[0], together[0]
    return Finding(
        passed=off <= PROCESSES_TOLERANCE,
        measured=f"off by {off:.1e}" if math.isfinite(off) else "not finite",
        bound=f"{PROCESSES_TOLERANCE:.0e}, {len(alone)} steps",
        cause="two processes do not take the steps that one takes (loss "
        f"{loss_of_two:.5f} instead of {loss:.5f}, gradient norm {norm_of_two:.5g} instead of {norm:.5g}): "
        "gradients and nats are to be SUMMED over processes once a step, before clipping (gradients.py, "
        "World.sum), and each process has its own micro-batches (batching.py)",
        figures={"relative_difference": off},
    )
