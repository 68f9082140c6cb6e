"""The description of a model's Medusa heads, in a file beside their tensors. Does not import torch, unlike `models/medusa.py`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from orthrus.errors import CheckpointError, ConfigError
from orthrus.files import read_json
from orthrus.models.config import ModelConfig

CONFIG_FILE = "medusa.json"
MOST_HEADS = 6
"""A runner has room for so many drafts of each sequence."""
_MOST_CONFIG_BYTES = 1 << 16


@dataclass(frozen=True)
class MedusaConfig:
    """The contents of `CONFIG_FILE`. The first two fields have the names of Medusa's own checkpoints."""

    medusa_num_heads: int
    medusa_num_layers: int
    """Residual layers of a head: always 1."""
    own_projections: bool
    """Whether each head has a vocabulary projection of its own. False: they share the model's LM head."""
    hidden_size: int
    vocab_size: int

    @staticmethod
    def of(model: ModelConfig, num_heads: int, own_projections: bool) -> "MedusaConfig":
        """Heads for `model`. Raises ConfigError for a number of heads that can't be served."""
        if not 1 <= num_heads <= MOST_HEADS:
            raise ConfigError(f"{num_heads} Medusa heads can't be served: choose from 1 to {MOST_HEADS}")
        return MedusaConfig(num_heads, 1, own_projections, model.hidden_size, model.vocab_size)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the heads' tensors, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index in range(self.medusa_num_heads):
            shapes[linear_name(index)] = (self.hidden_size, self.hidden_size)
            if self.own_projections:
                shapes[projection_name(index)] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def num_weights(self) -> int:
        """How many numbers the heads' tensors have."""
        return sum(map(math.prod, self.tensor_shapes().values()))


def linear_name(index: int) -> str:
    """The name of the tensor of a head's residual layer."""
    return f"medusa.{index}.linear.weight"


def projection_name(index: int) -> str:
    """The name of the tensor of a head's own vocabulary projection."""
    return f"medusa.{index}.projection.weight"


def has_medusa(folder: Path) -> bool:
    """Whether the folder has Medusa heads."""
    return (folder / CONFIG_FILE).exists()


def read_medusa(folder: Path, model: ModelConfig) -> MedusaConfig:
    """The description of the heads in `folder`.

    Raises ConfigError if there are none, and CheckpointError if they don't fit `model`.
    """
    if not has_medusa(folder):
        raise ConfigError(
            f"{folder} has no Medusa heads ({CONFIG_FILE}): train some with `orthrus train medusa`, and set medusa_heads to "
            "their folder"
        )
    stored = read_json(folder / CONFIG_FILE, _MOST_CONFIG_BYTES)
    for key, kind in (("medusa_num_heads", int), ("own_projections", bool)):
        if type(stored.get(key)) is not kind:
            raise CheckpointError(f"{folder / CONFIG_FILE} lacks a valid {key!r}: save the heads again")
    expected = MedusaConfig.of(model, stored["medusa_num_heads"], stored["own_projections"])
    if stored != asdict(expected):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: expected {asdict(expected)} for {model.name}, found {stored}: give the heads that were "
            "trained for this model"
        )
    return expected
