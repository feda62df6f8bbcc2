"""Models by name from the Hugging Face Hub, kept in that library's own cache."""

from __future__ import annotations

import re
from pathlib import Path

GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def repository(name: str) -> str | None:
    """OWNER/NAME for a name the Hub could know: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or OWNER/NAME."""
    if name in GPT2:
        return GPT2[name]
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None


def download(repository: str) -> Path:
    """The folder with a repository's files: fetched at first use, then from the cache without the network.

    Raises ValueError, one sentence with what to install or to fetch by hand.
    """
    by_hand = (
        f"put config.json, model.safetensors and tokenizer.json of https://huggingface.co/{repository} "
        "into a folder and name that folder"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ValueError(
            f"{repository} is on the Hugging Face Hub: pip install 'overnight[hub]' to fetch it, or {by_hand}"
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{repository} cannot be fetched ({reason[0].rstrip('.')}): {by_hand}") from None
