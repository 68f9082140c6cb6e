"""Computes the GPU memory of one rank of a replica from the settings and the model's config, without torch.

The engine itself measures when it has loaded: `orthrus/engine/sizing.py`. Both count by `weight_bytes` and `PassMemory`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import (
    COPY_BYTES,
    auto_draft_format,
    check_draft_weights,
    copies_bytes,
    draft_format,
)
from orthrus.engine.pass_limits import exchange_sizes, pass_room
from orthrus.errors import ConfigError
from orthrus.kernels.capabilities import Capability, multiplies_fp8
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.shard import Shard
from orthrus.models.sizes import dtype_name, weight_bytes
from orthrus.runner.pass_memory import PassMemory

GIB = 1 << 30


class Gpu(NamedTuple):
    """A kind of GPU."""

    gib: int
    """Memory that a process finds free."""
    capability: Capability


GPUS = {
    "A100": Gpu(39, (8, 0)),
    "A100-80G": Gpu(79, (8, 0)),
    "A10G": Gpu(22, (8, 6)),
    "B200": Gpu(178, (10, 0)),
    "H100": Gpu(79, (9, 0)),
    "H200": Gpu(139, (9, 0)),
    "L4": Gpu(22, (8, 9)),
    "L40S": Gpu(44, (8, 9)),
}
"""By Ray's accelerator type."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU, or in one process on a CPU. With several ranks, of the last one, whose part is the largest."""

    weights: int
    """Weights of the model, and the copies of them for drafts."""
    kept_as: str
    """Views and formats of the weights, for people."""
    medusa: int
    """Weights of the Medusa heads."""
    passes: int
    """What passes need: see `PassMemory`. 0 on a CPU."""
    exchange: int
    """Buffers for what ranks exchange."""
    token: int
    """KV cache of one token."""

    @property
    def total(self) -> int:
        """All but the KV cache."""
        return self.weights + self.medusa + self.passes + self.exchange

    @staticmethod
    def of(
        engine: EngineConfig, whole: ModelConfig, kind: str | None, medusa: MedusaConfig | None
    ) -> "MemoryPlan":
        """whole: the model that all ranks share. kind: of the GPU, a key of `GPUS`; None for a CPU. medusa: the heads."""
        ranks = engine.tensor_parallel_size
        shard = Shard(engine.with_settings(whole), ranks - 1, ranks)
        gpu = None if kind is None else GPUS[kind]
        check_draft_weights(engine, shard, None if gpu is None else gpu.capability)
        model = shard.config
        dtype = dtype_name(engine.dtype, model, "cpu" if kind is None else "cuda")
        item_bytes = DTYPE_SIZES[dtype]
        lossless = engine.keeps_12_bits(model) and kind is not None and dtype == "bfloat16"
        weights, views = weight_bytes(shard, item_bytes, lossless=lossless), "AR view"
        heads = 0 if medusa is None else medusa.num_weights * item_bytes
        exchange = exchange_sizes(engine, model).layout(ranks)[1] if ranks > 1 else 0
        passes = 0
        if kind is not None:
            room = pass_room(engine, model)
            num_heads = 0 if medusa is None else medusa.medusa_num_heads
            passes = PassMemory.of(shard, room, item_bytes, medusa_heads=num_heads, widens=lossless).total
        copies = draft_format(engine, model)
        if copies is None and gpu is not None and multiplies_fp8(gpu.capability) and item_bytes == 2:
            free = gpu.gib * engine.gpu_memory_utilization * GIB - passes - exchange - weights
            copies = auto_draft_format(engine, shard, item_bytes, free, gpu.capability)
        if copies in COPY_BYTES:
            views += f", {copies} copies for drafts"
            weights += copies_bytes(shard, item_bytes, copies, lossless=lossless)
        elif model.has_diffusion:
            views = "two views"
        stored = "bfloat16 in 12 bits" if lossless else dtype
        if not lossless and model.quantization is not None:
            stored = f"{model.quantization.method} and {dtype}"
        token = kv_bytes_per_token(model, item_bytes)
        return MemoryPlan(weights, f"{views}, {stored}", heads, passes, exchange, token)


def describe_memory(
    engine: EngineConfig, model: ModelConfig, kind: str | None, medusa: MedusaConfig | None
) -> str:
    """The plan in words; arguments: see `MemoryPlan.of`. Raises ConfigError when a GPU can't hold all with one full context."""
    plan, ranks = MemoryPlan.of(engine, model, kind, medusa), engine.tensor_parallel_size
    said = f"weights {_gib(plan.weights)}{'' if ranks == 1 else f' on each of {ranks}'} ({plan.kept_as})"
    if medusa is not None:
        said += f", {_gib(plan.medusa)} for {medusa.medusa_num_heads} Medusa heads"
    if kind is None:
        cache = engine.kv_cache_tokens
        return said + (f", KV cache {_gib(cache * plan.token)} for {cache} tokens" if cache else "")
    said += f", {_gib(plan.passes)} for passes"
    said += f", {_gib(plan.exchange)} for what they exchange" if plan.exchange else ""
    size = GPUS[kind].gib
    free = size * engine.gpu_memory_utilization * GIB - plan.total
    room = max(0, int(free / plan.token))
    positions = model.max_position_embeddings
    # Where no setting says how long a context is, the engine lowers it to a cache that is set smaller.
    context = engine.max_model_len or min(positions, engine.kv_cache_tokens or positions)
    tokens = engine.kv_cache_tokens or min(room, context * engine.max_num_seqs)
    if tokens > room or tokens < context:
        needed = max(tokens, context)
        raise ConfigError(
            f"args.engine: {said} and {_gib(needed * plan.token)} of KV cache for {needed} tokens don't fit the {size} GiB of "
            f"one {kind}: "
            + (
                f"set max_model_len and kv_cache_tokens to {room} at most"
                if room
                else "take a larger GPU (ray_actor_options.accelerator_type) or a smaller model"
            )
        )
    return (
        f"{said}, KV cache {_gib(tokens * plan.token)} for {tokens} tokens ({tokens / context:.1f} full contexts), "
        f"of {size} GiB on {'one' if ranks == 1 else 'each'} {kind}"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
