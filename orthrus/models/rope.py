"""Rotary settings of a Qwen3: which there are, between which bounds, and the context that they give."""

from collections.abc import Mapping
from typing import Any

from orthrus.errors import ConfigError
from orthrus.files import is_number, shown

ROPE_TYPES = ("default", "yarn")
_DEFAULT_THETA = 10_000.0
MOST_POSITIONS = (1 << 31) - 1
# Least and most of the rotary settings that are numbers.
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
    """Raise ConfigError unless there is such a rope_type here."""
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rope_type {shown(rope_type)} is not supported: use one of {', '.join(ROPE_TYPES)}"
        )


def check_rope_numbers(rope: Mapping[str, Any]) -> None:
    """Raise ConfigError for a rotary setting that is no number, or absurd; missing ones are for `check_rope`."""
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
        raise ConfigError("partial_rotary_factor is not supported: remove it (Qwen3 rotates whole heads)")
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

    Qwen3's model card only has rope settings added to a config.json whose max_position_embeddings stays as it was.
    """
    if rope["rope_type"] != "yarn":
        return 0
    return int(rope["factor"] * rope["original_max_position_embeddings"])


def standard_rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json in transformers-5 style, with Hugging Face's defaults.

    data: with max_position_embeddings, which YaRN's settings may leave out to mean it.
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
