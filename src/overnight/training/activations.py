"""Bytes that autograd keeps of each operation for the backward pass, by arithmetic on sizes.

In 16 bits GPT-2 keeps 36 C bytes for a token and layer. Korthikanti et al. 2022, equation 2, without the
T x T scores that fused attention never writes, has 34 C: it counts dropout's masks, this the float32 of the
residual stream. A tensor that is a view of another keeps that one whole.

C channels, H heads, T positions of the context.
"""

from __future__ import annotations

from overnight.model.kernels import QUERIES
from overnight.model.model_config import VALUE_GATE_CHANNELS, ModelConfig
from overnight.model.windows import block_spans
from overnight.training import Compute

FLOAT32, INT64 = 4, 8


def product_bytes(compute: Compute) -> int:
    """Bytes of one number in a matrix product."""
    return 2 if compute.precision in {"bf16", "fp16"} else FLOAT32


def kept_per_token(model: ModelConfig, compute: Compute) -> int:
    """Bytes of activations a token at the end of the trunk's forward pass."""
    stream = FLOAT32 * model.n_embd
    blocks = sum(kept_inside_block(model, compute, layer) for layer in range(model.n_layer))
    if compute.activation_checkpointing != "none":
        blocks += model.n_layer * stream  # their inputs, from which they are computed again
    embedding = stream if model.dropout > 0 else 0
    if model.embedding_norm:
        # RMSNorm keeps its output, which is also what the first block's shortcut keeps.
        is_kept = model.normalization == "rms" and model.embedding_shortcut
        embedding += stream * (not is_kept) + FLOAT32 * (1 if model.normalization == "rms" else 2)
    head = _kept_by_norm(model, compute, model.n_embd) + product_bytes(compute) * model.n_embd
    ids_and_targets = 16
    return blocks + embedding + head + ids_and_targets


def kept_inside_block(model: ModelConfig, compute: Compute, layer: int) -> int:
    """Bytes a token of a block that the backward pass does not compute again."""
    if compute.activation_checkpointing == "none":
        return kept_by_block(model, compute, layer)
    products = compute.activation_checkpointing == "selective"
    return _kept_by_products(model, compute, layer) if products else 0


def kept_by_block(model: ModelConfig, compute: Compute, layer: int) -> int:
    """Bytes a token of a block: inputs and statistics of normalizations, and the input of every product."""
    C = model.n_embd
    norms = 2 * _kept_by_norm(model, compute, C)
    noise = 2 * C * product_bytes(compute) if model.dropout > 0 else 0
    shortcut = FLOAT32 * C if model.embedding_shortcut else 0
    make_heads = _kept_of_heads if model.latent_rank is None else _kept_of_latent_heads
    parts = make_heads(model, compute, layer) + _kept_by_attention(model, compute, layer)
    return norms + noise + shortcut + parts + _kept_by_feed_forward(model, compute)


def mask_bytes(model: ModelConfig, compute: Compute) -> int:
    """Bytes of the masks of windows, which all rows and heads share, in all blocks."""
    total, T = 0, model.context_length
    for layer in range(model.n_layer):
        if (window := model.window(layer)) is None or _is_in_blocks(model, compute):
            continue
        spans = block_spans(T, window)
        total += _block_scores(spans) if compute.device == "cpu" else T * T
    return product_bytes(compute) * total if compute.activation_checkpointing == "none" else 0


def _kept_by_norm(model: ModelConfig, compute: Compute, channels: int) -> int:
    """The input and the statistics; of torch's RMSNorm with gains on a CPU also what the gains multiply.

    RMSNorm without gains keeps its output instead, which in 32 bits is the next product's input.
    """
    if model.normalization == "layer":
        return FLOAT32 * channels + 2 * FLOAT32
    if not model.norm_gains:
        return (0 if product_bytes(compute) == FLOAT32 else FLOAT32 * channels) + FLOAT32
    copies = 1 if compute.device.startswith("cuda") else 2
    return copies * FLOAT32 * channels + FLOAT32


def _kept_of_heads(model: ModelConfig, compute: Compute, layer: int) -> int:
    """Their product's input, queries, keys and values, and what these are made from."""
    C, K, width = model.n_embd, model.kv_heads, product_bytes(compute)
    kv, is_shared = K * model.head_channels, model.n_head > K
    is_new = _makes_new_queries(model)
    has_embedding = model.has_value_embedding(layer)
    is_viewed = _keeps_views(model, compute, layer)
    new = (C + kv) * is_new + C * is_shared + C * (has_embedding or is_shared) if is_viewed else 3 * C
    # Queries, keys and values that nothing changes are views of their product.
    keeps_product = is_viewed and (not is_new or not (has_embedding or is_shared))
    of_norm = 0
    if model.qk_norm:
        # It keeps its output, which in 32 bits attention keeps as well unless it is rotated first.
        is_own = width != FLOAT32 or model.positions == "rotary"
        of_norm = FLOAT32 * ((C + kv) * is_own + model.n_head + K)
    embedding = 0
    if has_embedding:
        read = min(VALUE_GATE_CHANNELS, C) if width != FLOAT32 else 0
        embedding = FLOAT32 * (kv + 2 * K) + width * read
    return width * (C + new + (C + 2 * kv) * keeps_product) + of_norm + embedding


def _kept_of_latent_heads(model: ModelConfig, compute: Compute, layer: int) -> int:
    """The same of latent attention; the values are views of the expanded latent vector."""
    assert model.latent_rank is not None, "heads without latent_rank are _kept_of_heads"
    C, R, P, width = model.n_embd, model.latent_rank, model.rotary_channels, product_bytes(compute)
    expanded = model.n_head * (2 * model.head_channels - P)
    inputs = C if width == FLOAT32 else 2 * C  # two products, and a copy in 16 bits for each
    keys_beside = FLOAT32 * P if width == FLOAT32 else 0  # the norm's input is a view of both
    heads = 2 * C + expanded if _keeps_views(model, compute, layer) else 3 * C
    return _kept_by_norm(model, compute, R) + keys_beside + width * (inputs + R + heads)


def _kept_by_attention(model: ModelConfig, compute: Compute, layer: int) -> int:
    """The output, and a sum for each head or the attention weights."""
    H, T, C, width = model.n_head, model.context_length, model.n_embd, product_bytes(compute)
    window = model.window(layer)
    output = width * C
    rounded = 0 if width == FLOAT32 else 6 * C  # a softmax in 16 bits takes float32 inputs
    if model.dropout > 0 and compute.device == "cpu":  # torch has no fused kernel with dropout there
        return 12 * H * T + rounded + output
    if compute.attention == "math" and window is None:
        return FLOAT32 * H * T + rounded + output
    if _is_in_blocks(model, compute):
        if window is not None:
            return width * H * _block_scores(block_spans(T, window)) // T + output
        return H * (T + QUERIES) + output  # the half of the square that is not in the future, in 16 bits
    # Where torch's kernel does not lay out its output as the next product reads it, that needs a copy.
    is_cut = window is not None and compute.device == "cpu"
    copies = 2 if is_cut or model.latent_rank is not None else 1
    return FLOAT32 * H + copies * output


def _kept_by_feed_forward(model: ModelConfig, compute: Compute) -> int:
    """The inputs of both products, and what the activation keeps."""
    C, width = model.n_embd, product_bytes(compute)
    hidden = {"gelu": 2, "relu2": 2, "swiglu": 4}[model.activation] * model.hidden_width
    if not model.n_expert:
        return width * (C + hidden)
    E, chosen = model.n_expert, model.chosen_experts
    pairs = chosen + (model.shared_experts or 0)
    router = FLOAT32 * (C + 2 * E + chosen) + INT64 * chosen
    # A pair's order and token, its share, and the expert's input, output and weighted output.
    return router + pairs * (2 * INT64 + width * (1 + 3 * C + hidden))


def _kept_by_products(model: ModelConfig, compute: Compute, layer: int) -> int:
    """Bytes a token of a block under selective checkpointing: the outputs of its products."""
    C, kv = model.n_embd, model.kv_heads * model.head_channels
    heads = C + 2 * kv + model.kv_heads * model.has_value_embedding(layer)
    if model.latent_rank is not None:
        rank, rotated = model.latent_rank, model.rotary_channels
        heads = C + rank + rotated + model.n_head * (2 * model.head_channels - rotated)
    mixed_and_projected = 2 * C
    wide = model.hidden_width * (2 if model.activation == "swiglu" else 1)
    pairs = (model.chosen_experts + (model.shared_experts or 0)) or 1
    router = FLOAT32 * model.n_expert
    products = product_bytes(compute) * (heads + mixed_and_projected + pairs * (wide + C))
    return products + router + FLOAT32 * model.n_head


def _makes_new_queries(model: ModelConfig) -> bool:
    """True if queries and keys are no views of their product."""
    return model.positions == "rotary" or model.qk_norm


def _keeps_views(model: ModelConfig, compute: Compute, layer: int) -> bool:
    """True if attention takes queries, keys and values as they are, without copies."""
    if _is_in_blocks(model, compute) or (model.dropout > 0 and compute.device == "cpu"):
        return False
    return compute.attention != "math" or model.window(layer) is not None


def _is_in_blocks(model: ModelConfig, compute: Compute) -> bool:
    """True if attention is computed in products of blocks."""
    return compute.attention == "blocks" and product_bytes(compute) != FLOAT32 and model.dropout == 0


def _block_scores(spans: list[tuple[int, int, int]]) -> int:
    """Attention weights of all blocks of a window, for one head."""
    return sum((end - start) * (end - first) for first, start, end in spans)
