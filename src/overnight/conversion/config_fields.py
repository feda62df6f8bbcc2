"""Fields of a config.json of Transformers: read one by one, all problems collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overnight.model.model_config import ModelConfig

Fields = dict[str, Any]
YARN_NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
"""Optional rotary parameters, and the value with which they change nothing here."""


class ConfigReader:
    """The fields of one config.json. A field with a wrong value is a sentence in `problems`."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.problems: list[str] = []

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; 1 in place of a wrong one."""
        found = self.content.get(name, default)
        if type(found) is int and found >= 1:
            return found
        self.problems.append(f"{name} is {shorten(found)}, not a whole number of at least 1")
        return 1

    def number(self, name: str, default: float) -> float:
        """A number; the default in place of a wrong one."""
        found = self._as_number(name, self.content.get(name, default))
        return default if found is None else found

    def number_or_none(self, name: str, default: float | None) -> float | None:
        """A number, or None where null is written."""
        found = self.content.get(name, default)
        return None if found is None else self._as_number(name, found)

    def one_of(self, name: str, default: object, allowed: tuple[Any, ...]) -> Any:
        """A value out of `allowed`; the first of them in place of a wrong one."""
        found = self.content.get(name, default)
        if any(type(found) is type(value) and found == value for value in allowed):
            return found
        expected = " or ".join(map(repr, allowed))
        self.problems.append(f"{name} is {shorten(found)}, not {expected}")
        return allowed[0]

    def rotation(self, context_length: int) -> Fields:
        """The rotary settings of ModelConfig, from rope_parameters, or rope_scaling and rope_theta.

        Transformers stretches by `factor`; here it is context_length / trained_context_length.
        """
        name = "rope_scaling" if self.content.get("rope_scaling") else "rope_parameters"
        rope = self.content.get(name) or {}
        if not isinstance(rope, dict):
            self.problems.append(f"{name} is {shorten(rope)}, not an object")
            return {}
        base = self._as_number("rope_theta", rope.get("rope_theta", self.content.get("rope_theta", 1e4)))
        kind = rope.get("rope_type", rope.get("type", "default"))
        found: Fields = {"rotary_base": 1e4 if base is None else base}
        known = {"rope_theta", "rope_type", "type", *YARN_NEUTRAL}
        if kind == "yarn":
            known |= {"factor", "original_max_position_embeddings"}
            trained = rope.get("original_max_position_embeddings")
            if type(trained) is not int or trained < 1 or rope.get("factor") != context_length / trained:
                self.problems.append(
                    f"factor of {name} is {shorten(rope.get('factor'))}, not max_position_embeddings="
                    f"{context_length} / original_max_position_embeddings={shorten(trained)}"
                )
            else:
                found |= {"rotary_scaling": "yarn", "trained_context_length": trained}
        elif kind != "default":
            self.problems.append(f"rope_type of {name} is {shorten(kind)}, not 'default' or 'yarn'")
        self.problems += [
            f"{each} of {name} is {shorten(value)}"
            for each, value in rope.items()
            if value is not None and (each not in known or value != YARN_NEUTRAL.get(each, value))
        ]
        return found

    def _as_number(self, name: str, found: object) -> float | None:
        if type(found) is float:
            return found
        try:
            if type(found) is int:
                return float(found)
        except OverflowError:
            pass
        self.problems.append(f"{name} is {shorten(found)}, not a number")
        return None


def shorten(value: object) -> str:
    """A value of a file, as it is shown in a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def rotary_fields(config: ModelConfig) -> Fields:
    """The rotary settings in the spelling of Transformers 5, and in that of 4 beside it."""
    scaling: Fields = {}
    if config.rotary_scaling == "yarn":
        trained = config.trained_context_length
        assert trained is not None, "ModelConfig.problems asks for it"
        factor = config.context_length / trained
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    parameters = {"rope_type": "default", "rope_theta": config.rotary_base, **scaling}
    old = {"rope_scaling": parameters} if scaling else {}
    return {"rope_parameters": parameters, "rope_theta": config.rotary_base, **old}
