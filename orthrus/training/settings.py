"""A training run's YAML file as dataclasses; a setting that does not exist is an error that names it."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from orthrus.errors import ConfigError

Section = TypeVar("Section")


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in `file`. Raises ConfigError naming the file."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a mapping of settings")
    return data


def section(kind: type[Section], data: dict[str, Any], where: str) -> Section:
    """`kind` built from `data`, a mapping of some of its fields. Lists become tuples, which frozen settings hold."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    try:
        return kind(**data)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
