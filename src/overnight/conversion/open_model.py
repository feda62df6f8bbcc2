"""A model by any name: a run, a checkpoint, a Hugging Face folder, a name on the Hub, nanoGPT's .pt file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from overnight.config import nearest
from overnight.conversion.huggingface import read_huggingface
from overnight.conversion.nanogpt import TOKENIZER, read_nanogpt
from overnight.model.gpt import GPT
from overnight.run_directory import RunDirectory
from overnight.tokenizer.open_tokenizer import load_tokenizer
from overnight.tokenizer.tokenizer import Tokenizer
from overnight.training.checkpoint.load import read_model, read_newest

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model ready to write or to be judged: on the CPU, in evaluation mode."""

    model: GPT
    tokenizer: Tokenizer
    origin: Path
    """The folder or file its weights were read from."""
    tokenizer_folder: Path
    """The folder its tokenizer was read from, or its name."""
    run: Path | None
    """The run it comes from; None for a model from elsewhere."""


def open_model(name: str) -> OpenedModel:
    """The model called `name`, looked for as a folder, in runs/, as a file, and on the Hugging Face Hub.

    Raises ValueError, which says where it was looked for, if there is none or it cannot be read.
    """

    for folder in (Path(name), RUNS / name):
        if name and folder.is_dir():
            return _open_folder(folder)
    if name and Path(name).is_file():
        return _open_nanogpt(Path(name))
    found = repository(name)
    is_path = Path(name).parent != Path() and Path(name).parent.is_dir()
    if found is not None and not is_path:
        return _open_huggingface(download(found))
    runs = [str(path) for path in sorted(RUNS.glob("*")) if RunDirectory(path).exists()]
    near = nearest(name, [*runs, *(Path(run).name for run in runs)]) if runs else ""
    raise ValueError(
        f"there is no model {name}: it is neither a folder or file, nor a run in {RUNS}/, nor a name on the "
        f"Hugging Face Hub ({', '.join(GPT2)}, OWNER/NAME){near}"
    )


def _open_folder(folder: Path) -> OpenedModel:
    """A run, one of its checkpoints, or a Hugging Face folder, whichever its files say it is."""
    if (folder / "state.json").is_file():
        return _open_checkpoint(folder)
    if (folder / "config.json").is_file():
        return _open_huggingface(folder)
    if RunDirectory(folder).exists():
        return _open_run(folder)
    raise ValueError(
        f"{folder} holds no model: neither a run (recipe.toml), nor a checkpoint (state.json), "
        "nor a Hugging Face model (config.json)"
    )


def _open_run(folder: Path) -> OpenedModel:
    read = read_newest(RunDirectory(folder).checkpoints, lambda found: (read_model(found), found))
    if read is None:
        raise ValueError(f"{folder} has no checkpoint yet; go on with overnight train --resume {folder}")
    return _with_tokenizer(*read, folder)


def _open_checkpoint(checkpoint: Path) -> OpenedModel:
    return _with_tokenizer(read_model(checkpoint), checkpoint, checkpoint.parent.parent)


def _with_tokenizer(model: GPT, checkpoint: Path, run: Path) -> OpenedModel:
    """The model of a checkpoint of `run`; the run holds the tokenizer."""
    tokenizer = RunDirectory(run).tokenizer
    if not tokenizer.is_dir():
        raise ValueError(f"{checkpoint} needs its run's tokenizer, and {tokenizer} is not there")
    return OpenedModel(
        model=model,
        tokenizer=load_tokenizer(tokenizer),
        origin=checkpoint,
        tokenizer_folder=tokenizer,
        run=run if RunDirectory(run).exists() else None,
    )


def _open_huggingface(folder: Path) -> OpenedModel:
    model, tokenizer = read_huggingface(folder)
    return OpenedModel(model=model, tokenizer=tokenizer, origin=folder, tokenizer_folder=folder, run=None)


def _open_nanogpt(file: Path) -> OpenedModel:
    model, tokenizer = read_nanogpt(file)
    return OpenedModel(
        model=model, tokenizer=tokenizer, origin=file, tokenizer_folder=Path(TOKENIZER), run=None
    )


# ---------------------------------------------------------------- models by name from the hugging face hub, kept in that library's own cache


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
