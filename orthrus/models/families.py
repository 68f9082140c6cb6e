"""The model families that run here, by the `model_type` of their config.json."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthrus.errors import ConfigError
from orthrus.files import read_json, shown
from orthrus.models.config import ModelConfig
from orthrus.models.family import Family, token_ids
from orthrus.models.qwen3 import Qwen3

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Register a family, so that models of its types can run."""
    FAMILIES.update(dict.fromkeys(family.model_types, family))


register(Qwen3())


def family_of(config: ModelConfig) -> Family:
    """The family that a model belongs to. Raises ConfigError if its `model_type` is not registered."""
    return _family(config.model_type)


def _family(model_type: object) -> Family:
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"model_type {shown(model_type)} is not supported: use a model of type {' or '.join(FAMILIES)}"
        )
    return family


def parse_config(data: Mapping[str, Any], *, name: str = "") -> ModelConfig:
    """The config that the contents of a config.json describe, in the style of transformers 4 or 5.

    name: the model's name in messages. Raises ConfigError, naming the setting, for a model that can't run here.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a JSON object, found {type(data).__name__}")
    return _family(data.get("model_type")).read_config(data, name)


def load_config(path: str | Path) -> ModelConfig:
    """Read `path`/config.json, and the end-of-sequence ids from generation_config.json where there is one.

    Raises ConfigError naming the file and the setting.
    """
    path = Path(path)
    file = path / CONFIG_FILE
    data = read_json(file)
    try:
        config = parse_config(data, name=_display_name(path))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    generation_file = path / GENERATION_CONFIG_FILE
    if not generation_file.exists():
        return config
    generation = read_json(generation_file)
    try:
        return replace(config, **_generation_tokens(generation, config))
    except ConfigError as error:
        raise ConfigError(f"{generation_file}: {error}") from error


def _generation_tokens(generation: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The fields of `config` that a generation_config.json decides.

    Its eos_token_id, if there is one, replaces config.json's. Its other special tokens count only if config.json has none.
    """
    changes: dict[str, Any] = {}
    if (eos := generation.get("eos_token_id")) is not None:
        changes["eos_token_ids"] = token_ids(eos, config.vocab_size)
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is not None and getattr(config, key) is None:
            changes[key] = generation[key]
    return changes


def _display_name(path: Path) -> str:
    """A directory's name, or the hub id of a snapshot in the hub cache (models--ORG--NAME/snapshots/REVISION)."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
