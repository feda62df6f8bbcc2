"""The configuration of a GPT: sizes, and switches for parts of later models; parameters, FLOPs. No torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from overnight.model import ActivationCheckpointing

MOST_PARAMETERS = 10**13  # fifty times the largest GPT-3: more is a typing error
VOCABULARY_MULTIPLE = 64  # 50,257 ids become 50,304 rows: whole tiles for matrix units
WIDTH_MULTIPLE = 64  # widths that are no multiple of n_embd are rounded up to whole tiles
EXPERTS_PER_TOKEN, BALANCE_RATE = 2, 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and parts of a GPT. The names of the sizes are GPT-2's, and the defaults are GPT-2 small."""

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
    positions: Literal["learned", "rotary"] = "learned"
    """learned: an embedding for each position (GPT-2); rotary: queries and keys are rotated (RoPE)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_scaling: Literal["none", "yarn"] = "none"
    """yarn: stretch the rotary frequencies of a model trained with trained_context_length."""
    trained_context_length: int | None = None
    """The context that a model was trained with before YaRN extends it to context_length."""
    normalization: Literal["layer", "rms"] = "layer"
    """layer: LayerNorm (GPT-2); rms: RMSNorm, without a mean and a bias."""
    norm_gains: bool = True
    """Normalization multiplies each channel by a learned gain."""
    biases: bool = True
    """Matrix products and LayerNorm add a learned bias."""
    qk_norm: bool = False
    """Normalize the queries and keys of each head (RMSNorm without a gain)."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Of the feed-forward part: gelu (GPT-2), relu2 (the square of ReLU), swiglu (gated)."""
    feed_forward_width: int | None = None
    """Hidden channels of the feed-forward part, of each expert if there are any; if left out 4 n_embd, with
    swiglu 8/3 n_embd, divided by the number of experts that a token uses."""
    tied_head: bool = True
    """The output layer uses the token embedding's weights (GPT-2)."""
    embedding_norm: bool = False
    """Normalize the embedding before the first block."""
    zero_projections: bool = False
    """Initialize the matrices that write into the residual stream with zeros."""
    logit_softcap: float | None = None
    """Bound logits to this absolute value, by a tanh; unbounded if left out."""
    embedding_shortcut: bool = False
    """Each block reads a learned mix of the residual stream and the embedding."""
    value_embeddings: Literal["none", "alternate", "all"] = "none"
    """Add an embedding of the token to the values of attention: in no block, every second block or all."""
    n_kv_head: int | None = None
    """Heads of keys and values, which groups of query heads share (GQA); n_head if left out."""
    window_pattern: str = "L"
    """Attention of the blocks, repeated: L the whole context, S a short window. The last block has L."""
    short_window: int | None = None
    """Positions of a short window; a quarter of context_length if left out."""
    latent_rank: int | None = None
    """Channels of the vector from which latent attention (MLA) computes keys and values; off if left out."""
    latent_rotary_channels: int | None = None
    """Channels of each head that are rotated in latent attention; half of the head if left out."""
    n_expert: int = 0
    """Experts of the feed-forward part (MoE), of which each token uses a few; 0: none."""
    experts_per_token: int | None = None
    """Experts that the router chooses for a token; 2 if left out."""
    shared_experts: int | None = None
    """Further experts, which every token uses; none if left out."""
    balance_rate: float | None = None
    """Step size of the bias that balances the load of the experts; 0.001 if left out, 0: no bias."""

    @property
    def vocabulary(self) -> int:
        """The number of token ids. Raises ValueError if it was left to the tokenizer."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set: give it, or use the tokenizer's")
        return self.vocab_size

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are rotated; 0 with learned positions."""
        if self.positions == "learned":
            return 0
        if self.latent_rank is None:
            return self.head_channels
        return self.latent_rotary_channels or self.head_channels // 2

    @property
    def cached_channels(self) -> tuple[int, int, int]:
        """What a cache keeps of a position and layer: heads, channels of a key and of a value.

        Latent attention keeps the rotated key and the latent vector, which all heads share.
        """
        if self.latent_rank is not None:
            return 1, self.rotary_channels, self.latent_rank
        return self.kv_heads, self.head_channels, self.head_channels

    @property
    def chosen_experts(self) -> int:
        """Experts that the router chooses for a token; 0 without experts."""
        return (self.experts_per_token or EXPERTS_PER_TOKEN) if self.n_expert else 0

    @property
    def load_balance_rate(self) -> float:
        """Step size of the balancing bias; 0: no bias."""
        return BALANCE_RATE if self.balance_rate is None else self.balance_rate

    @property
    def hidden_width(self) -> int:
        """Hidden channels of the feed-forward part, or of each expert."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        used = self.chosen_experts + (self.shared_experts or 0) or 1
        if self.activation == "swiglu":
            return round_up(-(-8 * self.n_embd // (3 * used)), WIDTH_MULTIPLE)
        return 4 * self.n_embd if used == 1 else round_up(-(-4 * self.n_embd // used), WIDTH_MULTIPLE)

    def window(self, layer: int) -> int | None:
        """The positions that each query of a block sees, its own included; None: the whole context."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == "S"
        if not is_short or layer == self.n_layer - 1:
            return None
        return min(self.short_window or max(1, self.context_length // 4), self.context_length)

    def has_value_embedding(self, layer: int) -> bool:
        """True if the block adds an embedding to its values. With alternate, the last block does."""
        if self.value_embeddings == "alternate":
            return (self.n_layer - 1 - layer) % 2 == 0
        return self.value_embeddings == "all"

    def problems(self) -> list[str]:
        """Invalid values, one sentence each; [] if there are none."""
        invalid = self._invalid_values()
        # The other values are compared with defaults; a sentence that names an invalid value is left out.
        valid = replace(self, **{name: getattr(ModelConfig, name) for name in invalid})
        found = [each for each in valid._misfits() if invalid.keys().isdisjoint(re.findall(r"\w+", each))]
        return [*invalid.values(), *found] or self._problem_of_size()

    def _invalid_values(self) -> dict[str, str]:
        """What is wrong with a single value, by its name."""
        counts = (
            "n_layer n_head n_embd context_length vocab_size trained_context_length feed_forward_width "
            "n_kv_head short_window latent_rank latent_rotary_channels experts_per_token"
        )
        given = {name: value for name in counts.split() if (value := getattr(self, name)) is not None}
        found = {name: f"{name}={value} must be at least 1" for name, value in given.items() if value < 1}
        if not 0.0 <= self.dropout < 1.0:
            found["dropout"] = f"dropout={self.dropout} must be at least 0 and less than 1"
        for name, least, most in (("rotary_base", 1, 1e30), ("logit_softcap", 1e-3, 1e6)):  # of float32
            if (value := getattr(self, name)) is not None and not least < value <= most:
                found[name] = f"{name}={value} must be greater than {least:g} and at most {most:g}"
        if self.n_expert < 0 or self.n_expert == 1:
            found["n_expert"] = f"n_expert={self.n_expert} must be at least 2, or 0 for none"
        if (self.shared_experts or 0) < 0:
            found["shared_experts"] = f"shared_experts={self.shared_experts} must be at least 0"
        if not 0 <= self.load_balance_rate < float("inf"):
            found["balance_rate"] = f"balance_rate={self.balance_rate} must be at least 0, and finite"
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            found["window_pattern"] = f"window_pattern={self.window_pattern!r} must be made of S and L"
        return found

    def _problem_of_size(self) -> list[str]:
        few = (weight_sizes(replace(self, n_layer=layers), self.vocab_size or 1) for layers in (1, 2))
        one, two = (sum(map(math.prod, shapes.values())) for shapes in few)
        count = one + (self.n_layer - 1) * (two - one)  # a list of 10^12 layers would fill the memory
        found = f"these sizes make {count:,} parameters, and the most is {MOST_PARAMETERS:,}"
        return [found] if count > MOST_PARAMETERS else []

    def _misfits(self) -> list[str]:
        """Contradictions between values that are valid by themselves."""
        found = self._misfits_of_positions() + self._misfits_of_attention() + self._misfits_of_experts()
        if self.n_embd % self.n_head:
            found.insert(0, f"n_embd={self.n_embd} does not divide among n_head={self.n_head} heads")
        return found

    def _misfits_of_positions(self) -> list[str]:
        found = []
        if self.positions == "learned":
            found += [
                f"{name} needs positions=rotary"
                for name, is_set in (
                    (f"rotary_base={self.rotary_base}", self.rotary_base != ModelConfig.rotary_base),
                    (f"rotary_scaling={self.rotary_scaling}", self.rotary_scaling != "none"),
                    (f"latent_rank={self.latent_rank}", self.latent_rank is not None),
                )
                if is_set
            ]
        elif self.rotary_channels % 2 and self.n_embd % self.n_head == 0:
            name = "n_embd / n_head" if self.latent_rank is None else "latent_rotary_channels"
            found.append(f"positions=rotary rotates pairs: {name} must be even, not {self.rotary_channels}")
        if self.rotary_scaling == "yarn" and self.trained_context_length is None:
            found.append("rotary_scaling=yarn needs trained_context_length, the context of its training")
        if self.rotary_scaling == "none" and self.trained_context_length is not None:
            found.append(f"trained_context_length={self.trained_context_length} needs rotary_scaling=yarn")
        if (trained := self.trained_context_length) is not None and trained > self.context_length:
            found.append(
                f"trained_context_length={trained} is more than context_length={self.context_length}"
            )
        return found

    def _misfits_of_attention(self) -> list[str]:
        found = []
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            found.append(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.short_window is not None and "S" not in self.window_pattern:
            found.append(f"short_window={self.short_window} needs a window_pattern with S")
        if self.latent_rank is None:
            if self.latent_rotary_channels is not None:
                found.append(f"latent_rotary_channels={self.latent_rotary_channels} needs latent_rank")
            return found
        found += [
            f"{name} can't be used with latent_rank={self.latent_rank}: leave one of them out"
            for name, is_set in (
                (f"qk_norm={self.qk_norm}", self.qk_norm),
                (f"n_kv_head={self.n_kv_head}", self.n_kv_head is not None),
                (f"value_embeddings={self.value_embeddings}", self.value_embeddings != "none"),
            )
            if is_set
        ]
        rotated = self.rotary_channels
        if self.positions == "rotary" and not 0 < rotated < self.head_channels:
            found.append(f"latent_rotary_channels={rotated} must be at least 1 and less than n_embd / n_head")
        return found

    def _misfits_of_experts(self) -> list[str]:
        if self.n_expert:
            wrong = f"experts_per_token={self.chosen_experts} is more than n_expert={self.n_expert}"
            return [wrong] * (self.chosen_experts > self.n_expert)
        return [
            f"{name}={value} needs n_expert"
            for name in ("experts_per_token", "shared_experts", "balance_rate")
            if (value := getattr(self, name)) is not None
        ]

    def parameter_count(self) -> int:
        """Parameters, a tied head counted once and the vocabulary unpadded (GPT-2 124M: 124,439,808)."""
        return sum(map(math.prod, weight_sizes(self, self.vocabulary).values()))

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L C T.

        PaLM paper, appendix B, as nanoGPT counts it: full square attention, recomputation not counted. N has
        no tables that are only looked up, and of the experts those that a token uses. A window counts its own
        length.
        """
        reach = sum(self.window(layer) or self.context_length for layer in range(self.n_layer))
        return 6 * _count_active(self) + 12 * self.n_embd * reach

    def executed_flops_per_token(self, activation_checkpointing: ActivationCheckpointing) -> int:
        """Floating-point operations that a training step executes for a token, in matrix products.

        6 for each weight of the blocks' matrices and of the padded head. Attention as fused kernels compute
        it: half the square, two products forward and five backward, where the scores are computed again (Dao
        2023, arXiv 2307.08691, section 4.1); windows are masked in the full square. With checkpointed blocks
        each runs forward once more except for its last product, which is not needed; selective checkpointing
        repeats no product.
        """
        matrices = _count_active(self, only_matrices=True)
        in_blocks = matrices - self.vocabulary * self.n_embd
        attention = self.n_layer * self.n_embd * self.context_length  # one product, 2 T C, over half of T
        executed = 6 * (in_blocks + self.padded_vocab_size() * self.n_embd) + 7 * attention
        used = self.chosen_experts + (self.shared_experts or 0) or 1
        last = self.n_layer * self.n_embd * self.hidden_width * used
        again = 2 * (in_blocks - last) + 2 * attention
        return executed + (again if activation_checkpointing == "block" else 0)

    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return round_up(self.vocabulary, VOCABULARY_MULTIPLE)


def round_up(value: int, multiple: int) -> int:
    """`value`, or the next multiple."""
    return -(-value // multiple) * multiple


Shape = tuple[int, ...]
PADDED = ("wte.weight", "lm_head.weight")  # in the module their rows are a multiple of 64
VALUE_GATE_CHANNELS = 12  # of the normalized stream, which decide how much of a value embedding is added


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every weight by name, as it is saved."""
    return weight_sizes(config, config.vocabulary)


@functools.lru_cache(maxsize=64)
def parameter_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """The shape of every parameter by name, in the module's order, the vocabulary padded."""
    rows = config.padded_vocab_size()
    return {
        name: (rows, *shape[1:]) if name in PADDED else shape for name, shape in weight_shapes(config).items()
    }


def weight_sizes(config: ModelConfig, vocabulary: int) -> dict[str, Shape]:
    """The shape of every parameter by name, in the module's order, for `vocabulary` ids."""
    C = config.n_embd
    found: dict[str, Shape] = {"wte.weight": (vocabulary, C)}
    if config.positions == "learned":
        found["wpe.weight"] = (config.context_length, C)
    for layer in range(config.n_layer):
        if config.embedding_shortcut:
            names = (f"h.{layer}.shortcut.{gain}_gain" for gain in ("stream", "embedding"))
            found |= dict.fromkeys(names, (1,))
        parts = (
            *(("ln_1", _norm_sizes(config, C)), ("attn", _attention_sizes(config, layer, vocabulary))),
            *(("ln_2", _norm_sizes(config, C)), ("mlp", _feed_forward_sizes(config))),
        )
        for part, sizes in parts:
            found |= {f"h.{layer}.{part}.{name}": shape for name, shape in sizes}
    found |= {f"ln_f.{name}": shape for name, shape in _norm_sizes(config, C)}
    if not config.tied_head:
        found["lm_head.weight"] = (vocabulary, C)
    return found


def _norm_sizes(config: ModelConfig, channels: int) -> Iterator[tuple[str, Shape]]:
    if config.norm_gains:
        yield "weight", (channels,)
        if config.biases and config.normalization == "layer":
            yield "bias", (channels,)


def _linear_sizes(config: ModelConfig, name: str, rows: int, columns: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if config.biases:
        yield f"{name}.bias", (rows,)


def _attention_sizes(config: ModelConfig, layer: int, vocabulary: int) -> Iterator[tuple[str, Shape]]:
    C, kv = config.n_embd, config.kv_heads * config.head_channels
    if config.latent_rank is not None:
        rank, rotated = config.latent_rank, config.rotary_channels
        content = config.head_channels - rotated
        yield "c_expand", (config.n_head * (content + config.head_channels), rank)
        yield from _linear_sizes(config, "c_query", C, C)
        yield from _linear_sizes(config, "c_latent", rank + rotated, C)
        yield from ((f"ln_latent.{name}", shape) for name, shape in _norm_sizes(config, rank))
    else:
        yield from _linear_sizes(config, "c_attn", C + 2 * kv, C)
    yield from _linear_sizes(config, "c_proj", C, C)
    if config.has_value_embedding(layer):
        yield "value_embedding.table.weight", (vocabulary, kv)
        yield "value_embedding.gate.weight", (config.kv_heads, min(VALUE_GATE_CHANNELS, C))


def _feed_forward_sizes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    C, F = config.n_embd, config.hidden_width
    wide = 2 * F if config.activation == "swiglu" else F
    if not config.n_expert:
        yield from _linear_sizes(config, "c_fc", wide, C)
        yield from _linear_sizes(config, "c_proj", C, F)
        return
    experts = config.n_expert + (config.shared_experts or 0)
    yield "c_fc", (experts, wide, C)
    yield "c_proj", (experts, C, F)
    yield "router", (config.n_expert, C)
    if config.load_balance_rate:
        yield "balance", (config.n_expert,)


def _count_active(config: ModelConfig, *, only_matrices: bool = False) -> int:
    """Weights that a token is multiplied with or shifted by, the head's included."""
    total = 0
    for name, shape in weight_sizes(config, config.vocabulary).items():
        is_table = name in {"wpe.weight"} | ({"wte.weight"} if not config.tied_head else set())
        if is_table or name.endswith("value_embedding.table.weight") or (only_matrices and len(shape) < 2):
            continue
        used = math.prod(shape)
        if len(shape) == 3:
            used = used // shape[0] * (config.chosen_experts + (config.shared_experts or 0))
        total += used
    return total
