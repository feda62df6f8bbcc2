"""Training: one optimizer step and what it is made of; checkpoints. The configurations need no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from overnight.model import ActivationCheckpointing, LossMethod
from overnight.model.model_config import ModelConfig

Sharding = Literal["none", "zero1", "fsdp", "hsdp"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Attention = Literal["fused", "blocks", "math"]
# Muon's, as the record of 2024-10-10 of modded-nanogpt and its successors; the warm-up is of 2024-11-06.
MATRIX_LEARNING_RATE, MOMENTUM, MOMENTUM_STEPS = 0.02, 0.95, 300
LEARNING_RATES = (
    *("matrix_learning_rate", "embedding_learning_rate", "head_learning_rate", "scalar_learning_rate"),
)
OF_MUON = (
    *("momentum", "momentum_warmup_steps", "matrix_weight_decay", "row_normalization"),
    "cautious_weight_decay",
)


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
    """The optimizer's settings; AdamW's defaults are the GPT-3 paper's, appendix B."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: all weights (GPT-2); muon: orthogonal updates of the blocks' matrices, AdamW for the rest."""
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
    matrix_learning_rate: float | None = None
    """With muon, the peak learning rate of the blocks' matrices; 0.02 if left out. peak_learning_rate then
    applies to the other weights."""
    embedding_learning_rate: float | None = None
    """With muon, the peak learning rate of the embeddings; peak_learning_rate if left out."""
    head_learning_rate: float | None = None
    """With muon, the peak learning rate of an untied output layer; peak_learning_rate if left out."""
    scalar_learning_rate: float | None = None
    """With muon, the peak learning rate of gains and biases; peak_learning_rate if left out."""
    momentum: float | None = None
    """Muon's momentum; 0.95 if left out."""
    momentum_warmup_steps: int | None = None
    """Steps over which Muon's momentum rises linearly from 0.85; 300 if left out."""
    matrix_weight_decay: float | None = None
    """Weight decay of Muon's matrices, per step and unit of learning rate; 0 if left out."""
    row_normalization: bool = False
    """With muon, normalize the rows of each update (NorMuon)."""
    cautious_weight_decay: bool = False
    """With muon, decay a weight only if the update also makes it smaller."""

    @property
    def matrix_rate(self) -> float:
        """Peak learning rate of Muon's matrices."""
        return MATRIX_LEARNING_RATE if self.matrix_learning_rate is None else self.matrix_learning_rate

    @property
    def full_momentum(self) -> float:
        """Muon's momentum after its warm-up."""
        return MOMENTUM if self.momentum is None else self.momentum

    @property
    def momentum_steps(self) -> int:
        """Steps of the warm-up of Muon's momentum."""
        return MOMENTUM_STEPS if self.momentum_warmup_steps is None else self.momentum_warmup_steps

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = []
        for name in ("peak_learning_rate", "epsilon", *LEARNING_RATES):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                found.append(f"{name}={value} must be greater than 0, and finite")
        for name in ("beta1", "beta2", "momentum"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                found.append(f"{name}={value} must be at least 0 and less than 1")
        for name in ("weight_decay", "matrix_weight_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                found.append(f"{name}={value} must be at least 0, and finite")
        if self.momentum_warmup_steps is not None and self.momentum_warmup_steps < 1:
            found.append(f"momentum_warmup_steps={self.momentum_warmup_steps} must be at least 1")
        if self.optimizer != "muon":
            found += [
                f"{name}={value} needs optimizer=muon"
                for name in (*LEARNING_RATES, *OF_MUON)
                if (value := getattr(self, name)) not in {None, False}
            ]
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            found.append(f"max_grad_norm={self.max_grad_norm} must be greater than 0, or left out")
        return found

    def misfits(self, model: ModelConfig, compute: ComputeConfig) -> list[str]:
        """Contradictions with other settings, one sentence each; [] if there are none."""
        found = []
        if self.head_learning_rate is not None and model.tied_head:
            found.append(f"head_learning_rate={self.head_learning_rate} needs tied_head=False")
        if self.optimizer != "muon":
            return found
        if self.cautious_weight_decay and not self.matrix_weight_decay:
            found.append("cautious_weight_decay=True needs matrix_weight_decay")
        if compute.sharding in {"fsdp", "hsdp"}:
            found.append(
                f"optimizer=muon updates whole matrices, and sharding={compute.sharding} divides their rows: "
                "choose sharding none or zero1"
            )
        if compute.precision == "fp16":
            found.append("optimizer=muon can't be used with precision=fp16, which scales gradients: use bf16")
        return found
