"""GPT-2: configuration, module, loss and attention kernels."""

from typing import Literal

LossMethod = Literal["full", "chunked", "fp8"]
"""How the output layer and its cross-entropy are computed; see `overnight.model.loss.head_loss`."""
ActivationCheckpointing = Literal["none", "selective", "block"]
"""Which activations of a block the backward pass computes again."""
