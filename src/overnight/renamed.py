"""Former names of settings, so that old recipes, runs and command lines can still be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """Former names of settings (old -> new), and former values by setting (old -> new)."""

    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def name(self, name: str) -> str:
        """The current name of a setting."""
        return self.names.get(name, name)

    def value(self, name: str, value: Any) -> Any:
        """The current spelling of the value of the setting with the current name `name`."""
        return self.values.get(name, {}).get(value, value) if isinstance(value, str) else value

    def settings(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """`old` with the current names and values."""
        return {self.name(name): self.value(self.name(name), value) for name, value in old.items()}

    def also(self, **names: str) -> Renamed:
        """A copy with additional former names."""
        return Renamed({**self.names, **names}, self.values)

    def options(self, words: Sequence[str]) -> list[str]:
        """Command-line words with the current options and values."""
        found: list[str] = []
        option = ""
        for word in words:
            if word.startswith("--"):
                written, equals, value = word.partition("=")
                off, name = ("no_", written[5:]) if written.startswith("--no-") else ("", written[2:])
                option = name.replace("-", "_")
                if option in self.names:
                    option = self.names[option]
                    written = f"--{off}{option}".replace("_", "-")
                found.append(written + equals + (self.value(option, value) if equals else ""))
            else:
                found.append(self.value(option, word))
        return found


NOTHING_RENAMED = Renamed()
RENAMED_SETTINGS = Renamed(
    names={
        "rows_per_micro_batch": "micro_batch_size",
        "ramp_from_tokens_per_step": "batch_ramp_start_tokens",
        "ramp_tokens": "batch_ramp_tokens",
        "recompute": "activation_checkpointing",
        "head": "loss",
        "bitwise": "deterministic_reduce",
        "save_in_background": "async_checkpoint",
        "stop_after": "max_time",
        "start_from": "init_from",
        "from": "init_from",
        "sources": "mixture",
        "shuffle_tokens": "shuffle_window",
        "spike_deviations": "spike_sigma",
    },
    values={
        "loss": {"whole": "full"},
        "attention": {"plain": "math"},
        "sharding": {"optimizer": "zero1", "full": "fsdp", "hybrid": "hsdp"},
    },
)
"""The settings of a recipe."""


def renamed_settings(cls: type) -> Renamed:
    """The former names of the settings of `cls`."""
    found: Renamed = getattr(cls, "RENAMED", NOTHING_RENAMED)
    return found
