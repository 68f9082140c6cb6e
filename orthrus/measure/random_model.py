"""Models of published shapes with random weights. The time of a pass does not depend on the values of the weights."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.rank_processes import start_ranks
from orthrus.engine.rank_worker import check_devices, rank_device
from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.lazy_tensors import LazyTensors
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.quantization import Quantization
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard

BLOCK_SIZE = 32
QUANTISED: Mapping[str, Quantization] = {
    "fp8": Quantization("fp8", 8, 128),
    "int8": Quantization("gptq", 8, 128),
    "int4": Quantization("awq", 4, 128),
}
"""The formats in which Qwen publishes quantised checkpoints."""


def shape_config(shape: str, diffusion: bool = True, quantised: str | None = None) -> ModelConfig:
    """The shape as a model, with a diffusion view or without. Raises ConfigError for an unknown one.

    quantised: the format of the AR view's linear layers, a key of `QUANTISED`; None: they are in full.
    """
    if shape not in QWEN3_SHAPES:
        raise ConfigError(f"shape {shape!r} is not known: use one of {', '.join(QWEN3_SHAPES)}")
    how = None if quantised is None else QUANTISED[quantised]
    model = replace(QWEN3_SHAPES[shape], name=f"Qwen3-{shape}", quantization=how)
    mask = min(151669, model.vocab_size - 1)
    return replace(model, block_size=BLOCK_SIZE, mask_token_id=mask) if diffusion else model


def random_weights(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, shard: Shard | None = None
) -> LazyTensors:
    """Random weights that keep activations at about size 1. Each is a function of its name alone. shard: the part to make."""

    family = family_of(model)

    def tensor(name: str) -> Tensor:
        shape = parts[name].shape
        seed = random.Random(name).getrandbits(40)
        generator = torch.Generator(device).manual_seed(seed)
        if name in quantised:
            return quantised_part(name, shape, generator)
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        whole = torch.empty(shape, device=device, dtype=dtype).normal_(
            0.0, shape[1] ** -0.5, generator=generator
        )
        part = None if shard is None else shard.part(family.division(name))
        return whole if part is None else whole.narrow(part[0], part[1], part[2] - part[1]).clone()

    def quantised_part(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Scales are such that weights have about the size of those that are not quantised."""
        assert model.quantization is not None
        bits, inputs = model.quantization.bits, max(model.hidden_size, model.intermediate_size)
        part = name.rpartition(".")[2]
        if part == "weight":
            spread = torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 100.0, generator=generator)
            return spread.clamp_(-448.0, 448.0).to(
                torch.float8_e4m3fn
            )  # Some versions of torch make NaN of more.
        if part == "g_idx":
            places = torch.arange(shape[0], device=device)
            return (places // (places.numel() if group == -1 else group)).to(torch.int32)
        if part == "qzeros":  # In the middle; GPTQ stores one less.
            middle = (1 << (bits - 1)) - (model.quantization.method == "gptq")
            word = sum(middle << place for place in range(0, 32, bits))
            return torch.full(shape, word - (word >> 31 << 32), device=device, dtype=torch.int32)
        if part == "qweight":
            limit = 1 << 31
            return torch.randint(-limit, limit, shape, device=device, dtype=torch.int32, generator=generator)
        numbers = 100.0 if part == "weight_scale_inv" else 2.0**bits / 12**0.5
        size = inputs**-0.5 / numbers
        spread = torch.empty(shape, device=device, dtype=torch.float32)
        return spread.uniform_(0.5 * size, 1.5 * size, generator=generator).to(torch.float16)

    parts = family.stored_parts(model)
    quantised = {name for name, part in parts.items() if not part.in_full}
    group = 0 if model.quantization is None else model.quantization.group_size
    return LazyTensors(parts, tensor)


def shape_engine(
    model: ModelConfig,
    schedule: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    medusa: MedusaConfig | None = None,
    **settings: Any,
) -> Engine:
    """An engine with random weights. medusa: the Medusa heads that the model gets, with any schedule."""
    fixed = {"model": model.name, "schedule": schedule, "adaptive_draft": False}
    config = EngineConfig.model_validate(fixed | settings)
    size = config.tensor_parallel_size
    config.check_model(model)
    check_devices(config)
    model = config.with_settings(model)
    if size > 1:
        device = rank_device(str(device), 0)
    with start_ranks(config, model, partial(_random_weights, model, str(dtype))) as ranks:
        weights = random_weights(model, device, dtype, shard=Shard(model, 0, size))
        if medusa is not None:
            weights.update(
                {
                    name: torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5
                    for name, shape in medusa.tensor_shapes().items()
                }
            )
        return Engine(config, model, weights, ranks=ranks)


def _random_weights(
    model: ModelConfig,
    name: str,
    device: torch.device,
    dtype: str,
    *,
    shard: Shard,
    check: Callable[[], None],
) -> LazyTensors:
    """See `LoadWeights`. name: the name of the dtype; `dtype`, the setting, is not used."""
    check()
    return random_weights(model, device, getattr(torch, name.removeprefix("torch.")), shard=shard)
