"""Rotary settings of a config.json: the supported types, the bounds of each number, and the context that they give."""

from collections.abc import Mapping
from typing import Any

from orthrus.errors import ConfigError
from orthrus.files import is_number, shown

ROPE_TYPES = ("default", "yarn")
_DEFAULT_THETA = 10_000.0
MOST_POSITIONS = (1 << 31) - 1
# The smallest and the largest value of each setting that is a number.
_NUMBERS = {
    "rope_theta": (1.0, 1e12),
    "factor": (1.0, 1e6),
    "original_max_position_embeddings": (1.0, float(1 << 31)),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (1e-3, 1e3),
    "mscale_all_dim": (1e-3, 1e3),
}


def check_rope_type(rope_type: object) -> None:
    """Raise ConfigError unless this rope_type is supported."""
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rope_type {shown(rope_type)} is not supported: use one of {', '.join(ROPE_TYPES)}"
        )


def check_rope_numbers(rope: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that is not a number or out of bounds. `check_rope` reports missing ones."""
    for key, value in rope.items():
        if value is None or key in ("rope_type", "type"):
            continue
        if key not in _NUMBERS:
            if not isinstance(value, bool | str) and not is_number(value, -1e12, 1e12):
                raise ConfigError(f"{shown(key)} of the rotary settings is no usable value: {shown(value)}")
            continue
        least, most = _NUMBERS[key]
        if not is_number(value, least, most):
            raise ConfigError(
                f"{key} must be a number of at least {least:g} and at most {most:g}, got {shown(value)}"
            )


def check_rope(rope: Mapping[str, Any]) -> None:
    """Raise ConfigError unless these are complete and usable rotary settings in transformers-5 style."""
    rope_type = rope.get("rope_type")
    check_rope_type(rope_type)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not supported: remove it (whole heads are rotated)")
    required = ("rope_theta", "factor", "original_max_position_embeddings")
    for key in required if rope_type == "yarn" else required[:1]:
        if rope.get(key) is None:
            raise ConfigError(f"{key} of rope_type {rope_type!r} is missing: add it")
    check_rope_numbers(rope)
    if rope_type == "yarn":
        if rope["rope_theta"] == 1:
            raise ConfigError("rope_theta must be over 1 with rope_type 'yarn'")
        if yarn_context(rope) > MOST_POSITIONS:
            raise ConfigError(
                f"factor {rope['factor']:g} times original_max_position_embeddings "
                f"{rope['original_max_position_embeddings']:g} is a context of more than "
                f"{MOST_POSITIONS} tokens: lower the factor"
            )


def yarn_context(rope: Mapping[str, Any]) -> int:
    """The context that YaRN extends to, in tokens; 0 without YaRN.

    Qwen3's model card tells users to add rope settings to config.json, and to leave its max_position_embeddings as it is.
    """
    if rope["rope_type"] != "yarn":
        return 0
    return int(rope["factor"] * rope["original_max_position_embeddings"])


def standard_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json in transformers-5 style, with Hugging Face's defaults.

    data: the settings, max_position_embeddings included. It is the default of YaRN's original_max_position_embeddings.
    """
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    rope = {key: value for key, value in given.items() if key != "type"}
    rope.setdefault("rope_type", given.get("type", "default"))
    rope.setdefault("rope_theta", data.get("rope_theta", _DEFAULT_THETA))
    if "partial_rotary_factor" in data:
        rope.setdefault("partial_rotary_factor", data["partial_rotary_factor"])
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", data["max_position_embeddings"])
    return {key: value for key, value in rope.items() if value is not None}
