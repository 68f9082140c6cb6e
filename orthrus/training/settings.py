"""A training run's YAML file as typed settings; one that is unknown or has a wrong value is an error that names it."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orthrus.errors import ConfigError
from orthrus.yaml_file import read_yaml


class Settings(BaseModel):
    """A section of a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSettings(Settings):
    """What every kind of training has in common.

    The length is one of: `steps`, optimiser steps; `epochs`, passes over the data; `seconds` of wall clock (only the first
    two give the same weights twice). rows: per optimiser step, over all processes;
    micro_batch: rows in one forward and backward pass of one process, None for all of its share; row_length: in tokens.
    optimizer: "adamw", or "muon" for the matrices inside the layers, at rate `matrix_lr`. warmup: share of the run;
    final_lr: share of the peak rate at the end of the cosine; clip: largest gradient norm. *_every: in steps.
    """

    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    rows: int
    micro_batch: int | None = None
    row_length: int
    optimizer: str
    lr: float
    matrix_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float
    warmup: float
    final_lr: float
    clip: float = 1.0
    compile: bool = True
    log_every: int
    save_every: int
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSettings":
        if sum(value is not None for value in (self.steps, self.epochs, self.seconds)) != 1:
            raise ValueError("set one of steps, epochs and seconds")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer {self.optimizer!r} is not known: use adamw or muon")
        return self


Kind = TypeVar("Kind", bound=Settings)


def read_settings(kind: type[Kind], file: Path, **instead: Any) -> Kind:
    """`kind` from the YAML file, with the values in `instead` that are not None in place of the file's.

    Raises ConfigError naming the file and the setting.
    """
    data = read_yaml(file).data
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a mapping of settings")
    data |= {key: value for key, value in instead.items() if value is not None}
    try:
        return kind(**data)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{file}: {'; '.join(problems)}") from error
