"""Which weights draft passes multiply: those of the AR rows, or rounded copies of their own.

Only verify passes have to be exact, so drafts may be rough. Where the weights of the AR rows are kept in 12 bits, drafts read 8
of them and need no copies. Copies in FP8 halve what a draft pass reads, and 4 bits leave little more than a quarter of the MLPs.
Copies take memory from the KV cache. In all these cases no pass has rows of both views: it would read both sets of weights.
"""

from collections.abc import Callable

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.kernels.capabilities import Capability, has_wgmma, multiplies_fp8
from orthrus.kernels.int4_sizes import INT4_BYTES
from orthrus.models.config import ModelConfig
from orthrus.models.shard import Shard
from orthrus.models.sizes import CopyBytes, ungrouped, weight_bytes
from orthrus.schedules.registry import SCHEDULES

COPY_BYTES = {
    "fp8": CopyBytes(1.001, 1.001),
    "fp8+int4": CopyBytes(1.002 + INT4_BYTES, 1.001),
    "int4": CopyBytes(0.001 + INT4_BYTES, 1.001),
}
"""The formats of copies, with the bytes of one number on a GPU. All also have a float32 scale for each output of a layer. Only
MLPs are in 4 bits. With "fp8+int4" they are in FP8 too, for passes of many rows. Inputs in 4 bits are padded to multiples of 256,
which is not counted: copies are a few percent larger than counted where a large model is divided among 8 GPUs."""
_IN_4_BITS = ("fp8+int4", "int4")
_AUTO = ("fp8+int4", "fp8", "int4")
"""The copies that "auto" chooses from, the largest first. It takes the first ones that leave the KV cache enough memory."""
ONE_PLANE = "lossless8"
"""The format of drafts that read 8 of the 12 bits of the AR rows' weights. It needs no memory."""
_LEAST_CACHE = 0.75
"""The share of the KV cache that must be left for "auto" to take copies."""


def _may_have_copies(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether the schedule drafts with weights of the model: its entry lists the setting `draft_weights`."""
    return "draft_weights" in SCHEDULES[config.schedule_for(model)].settings


def check_draft_weights(config: EngineConfig, shard: Shard, gpu: Capability | None) -> None:
    """Raise ConfigError if `config` asks for copies that can't be made from the rank's weights, or gain nothing on its device.

    gpu: its compute capability; None for a CPU, where copies are for tests.
    """
    copies = draft_format(config, shard.model)
    if copies is not None and gpu is not None and not multiplies_fp8(gpu):
        raise ConfigError(
            f"draft_weights {copies!r} needs a GPU with FP8 tensor cores, which those of compute capability 8.9 and later have: "
            "set draft_weights to auto or same"
        )
    if copies in _IN_4_BITS:
        if gpu is not None and not has_wgmma(gpu):
            raise ConfigError(
                f"draft_weights {copies!r} needs a Hopper GPU, such as an H100 or H200: set draft_weights to auto or fp8"
            )
        if (layer := ungrouped(shard)) is not None:
            raise ConfigError(
                f"draft_weights {copies!r} rounds weights in groups of inputs, but {layer}: set draft_weights to fp8 or same"
            )


def draft_format(config: EngineConfig, model: ModelConfig) -> str | None:
    """The weight format that `config` names for drafts. None if drafts share the AR rows' weights, or if "auto" decides."""
    wanted = config.draft_weights
    return wanted if wanted in (*COPY_BYTES, ONE_PLANE) and _may_have_copies(config, model) else None


def shared_format(config: EngineConfig, model: ModelConfig) -> str | None:
    """The weight format of a quantised model's drafts on a GPU, if they have no copies. None for other models.

    The drafts share all weights with the AR rows, except the projections of the diffusion view. These are not quantised, and a
    kernel takes one format. So they are layers of their own, and no pass has rows of both views.
    """
    how = model.quantization
    if how is None or how.lossless or not model.has_diffusion or draft_format(config, model) is not None:
        return None
    return "plain"


def reads_one_plane(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether `draft_weights: auto` is "lossless8", if the AR rows' weights are in 12 bits."""
    return config.draft_weights == "auto" and not config.draft_lead and _may_have_copies(config, model)


def auto_draft_format(
    config: EngineConfig, shard: Shard, item_bytes: int, memory: float, gpu: Capability
) -> str | None:
    """What `draft_weights: auto` chooses on a GPU with FP8 tensor cores. None: no copies, as for a quantised model.

    shard: the part of the model that one GPU has. item_bytes: bytes of one weight. memory: bytes that the copies and the KV
    cache may take together, beside weights and passes. gpu: its compute capability.

    Copies are made if the KV cache can still hold `kv_cache_tokens`. If these are not set, it must keep three quarters of its
    size, and room for a full context.
    """
    model = shard.config
    if config.draft_weights != "auto" or config.draft_lead or not _may_have_copies(config, model):
        return None
    if model.quantization is not None or config.keeps_12_bits(model):
        return None
    width = kv_bytes_per_token(model, item_bytes)
    if config.kv_cache_tokens is not None:
        cache: float = config.kv_cache_tokens * width
    else:
        context = (config.max_model_len or model.max_position_embeddings) * width
        cache = max(context, _LEAST_CACHE * min(context * config.max_num_seqs, memory))
    in_4_bits = has_wgmma(gpu) and ungrouped(shard) is None
    possible = [copies for copies in _AUTO if in_4_bits or copies not in _IN_4_BITS]
    room = memory - cache
    return next((copies for copies in possible if copies_bytes(shard, item_bytes, copies) <= room), None)


def smallest_copies(config: EngineConfig, copies: str | None, least: Callable[[int], int]) -> str | None:
    """What all ranks take, if this one has chosen `copies`. With "auto" a GPU may have less room than another.

    least: the smallest of all ranks' numbers, see `Ranks.least`.
    """
    if config.draft_weights != "auto" or not (copies is None or copies in COPY_BYTES):
        return copies
    choices = (None, *reversed(_AUTO))
    return choices[least(choices.index(copies))]


def copies_bytes(shard: Shard, item_bytes: int, format: str, *, lossless: bool = False) -> int:
    """How many bytes copies for drafts in `format` add to the weights on a GPU. lossless: see `weight_bytes`."""
    with_copies = weight_bytes(shard, item_bytes, COPY_BYTES[format], lossless=lossless)
    return with_copies - weight_bytes(shard, item_bytes, lossless=lossless)
