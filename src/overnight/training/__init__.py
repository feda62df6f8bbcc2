"""Training: one optimizer step and what it is made of; checkpoints. The configurations need no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from overnight.model import ActivationCheckpointing, LossMethod

Sharding = Literal["none", "zero1", "fsdp", "hsdp"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Attention = Literal["fused", "blocks", "math"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the machine is used. Settings left out are chosen for it and recorded in the run's recipe."""

    device: str | None = None
    """cpu, cuda, cuda:1 or mps; the best device found if left out."""
    precision: Precision | None = None
    """Precision of matrix products; weights, sums and losses stay float32. The device's native one if left
    out."""
    compile: bool | None = None
    """Compile the training step with torch.compile; if left out, wherever its compiler is found."""
    attention: Attention | None = None
    """fused: torch's fastest kernel; blocks: products of blocks, faster on CPUs with bfloat16; math: the
    unfused formula. Chosen for the device if left out."""
    loss: LossMethod | None = None
    """full: all logits at once; chunked: the logits of some rows at a time, in less memory; fp8: the output
    layer's products in 8 bits, faster and less exact, on GPUs that support it. full if left out."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that the backward pass computes again instead of keeping: all but matrix products and
    attention (selective), or all of each block; less memory, more time, the same numbers."""
    processes: int | Literal["auto"] | None = None
    """Train with this number of processes on this machine, one for each GPU; auto: one for every GPU. Leave
    it out under torchrun or srun, which start the processes."""
    sharding: Sharding | None = None
    """What several processes shard. none: nothing; zero1: AdamW's moments; fsdp: weights and
    gradients as well (FSDP2); hsdp: the same within each machine. The first that fits if left out."""
    deterministic_reduce: bool = False
    """Sum gradients in one fixed binary tree: the weights are bitwise equal for any number of processes.
    On a CPU, computes with one thread."""
    timeout_seconds: int = 600
    """A process without progress for this time ends the run and prints the stack of every process."""
    max_restarts: int = 0
    """Number of restarts from the last checkpoint after one of the processes died."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A `ComputeConfig` with everything decided for one device."""

    device: str
    precision: Precision
    compile: bool
    attention: Attention
    loss: LossMethod
    activation_checkpointing: ActivationCheckpointing = "none"
    sharding: Sharding = "none"
    deterministic_reduce: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's settings; the defaults are the GPT-3 paper's, appendix B."""

    peak_learning_rate: float = 6e-4
    """Learning rate after warm-up. GPT-3 paper, table 2.1, for 125M; GPT-2's was never published."""
    weight_decay: float = 0.1
    """Decay of the matrices, per step and unit of learning rate."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float | None = 1.0
    """Largest norm of all gradients together, by scaling them down; None: no clipping."""

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        for name in ("peak_learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                found.append(f"{name}={getattr(self, name)} must be greater than 0, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if not 0 <= self.weight_decay < math.inf:
            found.append(f"weight_decay={self.weight_decay} must be at least 0, and finite")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            found.append(f"max_grad_norm={self.max_grad_norm} must be greater than 0, or left out")
        return found
