"""The sizes of GPT-2 and GPT-3, their parameter and FLOP counts. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from overnight.model import ActivationCheckpointing

MOST_PARAMETERS = 10**13  # fifty times the largest GPT-3: more is taken for a typing error
VOCABULARY_MULTIPLE = 64  # 50,257 ids become 50,304 rows: whole tiles for matrix units


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT; the names are GPT-2's own."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; n_embd is divided evenly among them."""
    n_embd: int = 768
    """Channels of the residual stream."""
    context_length: int = 1024
    """Longest input, in tokens."""
    vocab_size: int | None = None
    """Number of token ids; the tokenizer's if left out."""
    dropout: float = 0.0
    """Share of activations dropped while training; GPT-2's pretraining reproductions use none."""

    @property
    def vocabulary(self) -> int:
        """The number of token ids. Raises ValueError if it was left to the tokenizer."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set: give it, or use the tokenizer's")
        return self.vocab_size

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        found = [
            f"{name}={value} must be at least 1"
            for name in ("n_layer", "n_head", "n_embd", "context_length", "vocab_size")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not found:
            found = self._misfits()
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout={self.dropout} must be at least 0 and less than 1")
        return found

    def _misfits(self) -> list[str]:
        """Contradictions between values that are valid by themselves."""
        if self.n_embd % self.n_head:
            return [f"n_embd={self.n_embd} does not divide among n_head={self.n_head} heads"]
        count = self._count_parameters(self.vocab_size or 1)
        if count > MOST_PARAMETERS:
            return [f"these sizes make {count:,} parameters, and the most is {MOST_PARAMETERS:,}"]
        return []

    def parameter_count(self) -> int:
        """Parameters, the tied head counted once and the vocabulary unpadded (GPT-2 124M: 124,439,808)."""
        return self._count_parameters(self.vocabulary)

    def _count_parameters(self, vocabulary: int) -> int:
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (vocabulary + self.context_length + 2) * self.n_embd + self.n_layer * block

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L C T, with N without `wpe`.

        PaLM paper, appendix B, as nanoGPT counts it: full square attention, recomputation not counted.
        """
        weights = self.parameter_count() - self.context_length * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * self.context_length

    def executed_flops_per_token(self, activation_checkpointing: ActivationCheckpointing) -> int:
        """Floating-point operations that a training step executes for a token, in matrix products.

        6 for each weight of the blocks and of the padded head. Attention as fused kernels compute it: half
        the square, two products forward and five backward, where the scores are computed again (Dao 2023,
        arXiv 2307.08691, section 4.1). With checkpointed blocks each runs forward once more except for its
        last product, which is not needed; selective checkpointing repeats no product.
        """
        square = self.n_layer * self.n_embd**2
        attention = self.n_layer * self.n_embd * self.context_length  # one product, 2 T C, over half of T
        executed = 6 * (12 * square + self.padded_vocab_size() * self.n_embd) + 7 * attention
        return executed + (2 * 8 * square + 2 * attention if activation_checkpointing == "block" else 0)

    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _gpt(n_layer: int, n_head: int, n_embd: int, context_length: int) -> ModelConfig:
    return ModelConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, context_length=context_length, vocab_size=50257
    )


PRESETS = {
    # Language Models are Unsupervised Multitask Learners, table 2 (the names say the true counts)
    "gpt2-124m": _gpt(12, 12, 768, 1024),
    "gpt2-350m": _gpt(24, 16, 1024, 1024),
    "gpt2-774m": _gpt(36, 20, 1280, 1024),
    "gpt2-1558m": _gpt(48, 25, 1600, 1024),
    # Language Models are Few-Shot Learners, table 2.1
    "gpt3-125m": _gpt(12, 12, 768, 2048),
    "gpt3-350m": _gpt(24, 16, 1024, 2048),
    "gpt3-760m": _gpt(24, 16, 1536, 2048),
    "gpt3-1.3b": _gpt(24, 16, 2048, 2048),  # the table says 24 heads of 128, which is not 2048
    "gpt3-2.7b": _gpt(32, 32, 2560, 2048),
    "gpt3-6.7b": _gpt(32, 32, 4096, 2048),
    "gpt3-13b": _gpt(40, 40, 5120, 2048),  # the table says 5140, which 40 heads of 128 do not make
    "gpt3-175b": _gpt(96, 96, 12288, 2048),
}
