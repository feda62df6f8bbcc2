"""Open a model by name: a run, a checkpoint, a Hugging Face folder, a name on the Hub, nanoGPT's .pt file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from overnight.config import nearest
from overnight.conversion.huggingface import read_end_ids, read_huggingface
from overnight.conversion.nanogpt import TOKENIZER, read_nanogpt
from overnight.model.gpt import GPT
from overnight.run_directory import RunDirectory
from overnight.terminal import shell_command
from overnight.tokenizer.open_tokenizer import load_tokenizer, read_json_object
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.training.checkpoint.load import read_model, read_newest

RUNS = Path("runs")
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model with its tokenizer, on the CPU, in evaluation mode."""

    model: GPT
    tokenizer: Tokenizer
    origin: Path
    """The folder or file that the weights were read from."""
    tokenizer_folder: Path
    """The folder that the tokenizer was read from, or its name."""
    run: Path | None = None
    """The run that the model belongs to; None for a model from elsewhere."""
    end_ids: frozenset[int]
    """The ids that end a text."""


def open_model(name: str) -> OpenedModel:
    """Look for `name` as a folder, in runs/, as a file, and on the Hugging Face Hub.

    Raises ValueError, listing the places that were searched, if there is none or it cannot be read.
    """
    for folder in (Path(name), RUNS / name):
        if name and folder.is_dir():
            return _open_folder(folder)
    if name and Path(name).is_file():
        model, tokenizer = read_nanogpt(Path(name))
        return _opened(model, tokenizer, Path(name), Path(TOKENIZER))
    repository = hub_repository(name)
    is_path = Path(name).parent != Path() and Path(name).parent.is_dir()
    if repository is not None and not is_path:
        return _open_huggingface(download_from_hub(repository))
    runs = [str(path) for path in sorted(RUNS.glob("*")) if RunDirectory(path).exists()]
    suggestion = nearest(name, [*runs, *(Path(run).name for run in runs)]) if runs else ""
    raise ValueError(
        f"there is no model {name}: it is neither a folder nor a file, nor a run in {RUNS}/, nor a name on "
        f"the Hugging Face Hub ({', '.join(HUB_NAMES)}, OWNER/NAME){suggestion}"
    )


def _open_folder(folder: Path) -> OpenedModel:
    """A run, one of its checkpoints, or a Hugging Face folder, depending on its files."""
    if (folder / "state.json").is_file():
        return _with_tokenizer(read_model(folder), folder, folder.parent.parent)
    if (folder / "config.json").is_file():
        return _open_huggingface(folder)
    if RunDirectory(folder).exists():
        read = read_newest(RunDirectory(folder).checkpoints, lambda path: (read_model(path), path))
        if read is None:
            raise ValueError(
                f"{folder} has no checkpoint yet; continue with "
                f"`{shell_command('train', '--resume', folder)}`"
            )
        return _with_tokenizer(*read, folder)
    raise ValueError(
        f"{folder} holds no model: neither a run (recipe.toml), nor a checkpoint (state.json), "
        "nor a Hugging Face model (config.json)"
    )


def _with_tokenizer(model: GPT, checkpoint: Path, run: Path) -> OpenedModel:
    """The model of a checkpoint, with the tokenizer of its run."""
    folder = RunDirectory(run).tokenizer
    if not folder.is_dir():
        raise ValueError(f"{checkpoint} needs its run's tokenizer, but there is no {folder}")
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint not in (_trained_with(run) or {tokenizer.fingerprint}):
        raise ValueError(f"{folder} is not the tokenizer that {run} was trained with: restore it from a copy")
    return _opened(model, tokenizer, checkpoint, folder, run if RunDirectory(run).exists() else None)


def _trained_with(run: Path) -> set[str]:
    """The fingerprints of the tokenizers in data.json, one for each source; empty without the file."""
    path = RunDirectory(run).data
    data = read_json_object(path) if path.is_file() else {}
    sources = [data, *(value for value in data.values() if isinstance(value, dict))]
    return {source["tokenizer_fingerprint"] for source in sources if "tokenizer_fingerprint" in source}


def _open_huggingface(folder: Path) -> OpenedModel:
    model, tokenizer = read_huggingface(folder)
    return _opened(model, tokenizer, folder, folder, end_ids=read_end_ids(folder))


def _opened(
    model: GPT,
    tokenizer: Tokenizer,
    origin: Path,
    tokenizer_folder: Path,
    run: Path | None = None,
    end_ids: frozenset[int] = frozenset(),
) -> OpenedModel:
    """The model, whose texts end at the tokenizer's end of text if it names no ids of its own.

    Raises FloatingPointError if a weight is not finite.
    """
    for name, weight in model.weights().items():
        if not torch.isfinite(weight).all():
            raise FloatingPointError(
                f"{origin}: {name} holds values that are not finite; restore it from a copy"
            )
    return OpenedModel(
        model=model,
        tokenizer=tokenizer,
        origin=origin,
        tokenizer_folder=tokenizer_folder,
        run=run,
        end_ids=end_ids or frozenset([tokenizer.end_of_text]),
    )


def hub_repository(name: str) -> str | None:
    """OWNER/NAME for gpt2, gpt2-medium, gpt2-large, gpt2-xl and OWNER/NAME; None for any other name."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None


def download_from_hub(repository: str) -> Path:
    """The folder of a repository's files, in the Hub library's own cache; fetched once.

    Raises ValueError, with what to install or to download by hand.
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
        return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{repository} cannot be fetched ({reason[0].rstrip('.')}): {by_hand}") from None
