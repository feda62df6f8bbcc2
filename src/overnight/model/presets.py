"""The published sizes of GPT-2 and GPT-3. Needs no torch."""

from __future__ import annotations

from overnight.model.model_config import ModelConfig


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
