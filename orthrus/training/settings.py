"""A training run's YAML file as typed settings. Unknown settings and wrong values are errors that name them."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orthrus.errors import ConfigError
from orthrus.yaml_file import read_yaml


class Settings(BaseModel):
    """A section of a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSettings(Settings):
    """Settings of every kind of training. Exactly one of `steps`, `epochs` and `seconds` sets how long it lasts."""

    # Optimiser steps.
    steps: int | None = None
    # Passes over the data.
    epochs: float | None = None
    # Wall clock. A second run of this length does not give the same weights.
    seconds: float | None = None
    # Rows of an optimiser step, over all processes.
    rows: int
    # Rows in one forward and backward pass of one process. None: all rows of its share.
    micro_batch: int | None = None
    # Tokens of a row.
    row_length: int
    # "adamw"; or "muon" for the matrices inside the layers, and AdamW for the rest.
    optimizer: str
    # Peak learning rate of AdamW.
    lr: float
    # Peak learning rate of Muon.
    matrix_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float
    # Share of the run in which the learning rate rises.
    warmup: float
    # The learning rate at the end of the cosine, as a share of the peak.
    final_lr: float
    # The largest gradient norm.
    clip: float = 1.0
    # Whether torch.compile is used.
    compile: bool = True
    # Steps between two lines of metrics, and between two saved states.
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


class FrozenBaseSettings(TrainingSettings):
    """Settings of all heads for a frozen base. `epochs` are passes over the model's own answers."""

    rows: int = 24
    row_length: int = 1024
    # Share of the rows that come from the model's own answers. The others come from the corpus.
    sampled: float = 1.0
    optimizer: str = "adamw"
    matrix_lr: float = 5e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    final_lr: float = 0.1
    log_every: int = 100
    save_every: int = 2000


Kind = TypeVar("Kind", bound=Settings)


def read_settings(kind: type[Kind], file: Path, **instead: Any) -> Kind:
    """Read settings of `kind` from a YAML file. Values in `instead` that are not None replace the file's.

    Raises ConfigError that names the file and the setting.
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
