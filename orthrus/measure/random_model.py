"""Models of published shapes with random weights: what passes cost does not depend on what the weights are."""

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orthrus.engine import Engine, EngineConfig
from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.shapes import QWEN3_SHAPES

BLOCK_SIZE = 32


def shape_config(shape: str, diffusion: bool = True) -> ModelConfig:
    """The shape as a model, with a diffusion view or without. Raises ConfigError for an unknown one."""
    if shape not in QWEN3_SHAPES:
        raise ConfigError(f"shape {shape!r} is not known: use one of {', '.join(QWEN3_SHAPES)}")
    model = replace(QWEN3_SHAPES[shape], name=f"Qwen3-{shape}")
    return replace(model, block_size=BLOCK_SIZE, mask_token_id=151669) if diffusion else model


def random_weights(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that keep a row's size about one, each a function of its name alone."""

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        seed = random.Random(name).getrandbits(40)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(shape, device=device, dtype=dtype).normal_(
            0.0, shape[1] ** -0.5, generator=generator
        )

    return {name: tensor(name, shape) for name, shape in family_of(model).tensor_shapes(model).items()}


def shape_engine(
    model: ModelConfig, schedule: str, device: torch.device, dtype: torch.dtype, **settings: Any
) -> Engine:
    """An engine of random weights."""
    fixed = {"model": model.name, "schedule": schedule, "adaptive_draft": False}
    config = EngineConfig.model_validate(fixed | settings)
    return Engine(config, model, random_weights(model, device, dtype))
