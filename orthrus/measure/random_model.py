"""Models of published shapes with random weights: what passes cost does not depend on what the weights are."""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.rank_processes import start_ranks
from orthrus.engine.rank_worker import rank_device
from orthrus.errors import ConfigError
from orthrus.kernels.ranks import ONE_RANK
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard

BLOCK_SIZE = 32


def shape_config(shape: str, diffusion: bool = True) -> ModelConfig:
    """The shape as a model, with a diffusion view or without. Raises ConfigError for an unknown one."""
    if shape not in QWEN3_SHAPES:
        raise ConfigError(f"shape {shape!r} is not known: use one of {', '.join(QWEN3_SHAPES)}")
    model = replace(QWEN3_SHAPES[shape], name=f"Qwen3-{shape}")
    return replace(model, block_size=BLOCK_SIZE, mask_token_id=151669) if diffusion else model


def random_weights(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, shard: Shard | None = None
) -> dict[str, Tensor]:
    """Weights that keep a row's size about one, each a function of its name alone. shard: the part of the model to make."""

    family = family_of(model)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        seed = random.Random(name).getrandbits(40)
        generator = torch.Generator(device).manual_seed(seed)
        whole = torch.empty(shape, device=device, dtype=dtype).normal_(
            0.0, shape[1] ** -0.5, generator=generator
        )
        part = None if shard is None else shard.part(family.division(name))
        return whole if part is None else whole.narrow(part[0], part[1], part[2] - part[1]).clone()

    return {name: tensor(name, shape) for name, shape in family.tensor_shapes(model).items()}


def shape_engine(
    model: ModelConfig, schedule: str, device: torch.device, dtype: torch.dtype, **settings: Any
) -> Engine:
    """An engine of random weights."""
    fixed = {"model": model.name, "schedule": schedule, "adaptive_draft": False}
    config = EngineConfig.model_validate(fixed | settings)
    size = config.tensor_parallel_size
    config.check_model(model)
    model = config.with_settings(model)
    ranks = ONE_RANK
    if size > 1:
        ranks = start_ranks(config, model, partial(_random_weights, model, str(dtype)))
        device = rank_device(str(device), 0)
    weights = random_weights(model, device, dtype, shard=Shard(model, 0, size))
    return Engine(config, model, weights, ranks=ranks)


def _random_weights(
    model: ModelConfig, name: str, device: torch.device, dtype: str, *, shard: Shard
) -> dict[str, Tensor]:
    """See `LoadWeights`. name: that of the dtype; a setting does not say it here."""
    return random_weights(model, device, getattr(torch, name.removeprefix("torch.")), shard=shard)
