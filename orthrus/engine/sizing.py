"""How much an engine makes room for: the rows of a pass, the pages of its cache, its context; and whether a model fits at all."""

import logging
import os

import torch

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import (
    COPY_BYTES,
    ONE_PLANE,
    auto_draft_format,
    check_draft_weights,
    draft_format,
    reads_one_plane,
    shared_format,
)
from orthrus.engine.pass_limits import max_pages, pass_room
from orthrus.errors import ConfigError
from orthrus.kernels.device import has_fp8_mma
from orthrus.models.config import ModelConfig
from orthrus.models.forward import LayerParallelForward
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.shard import Shard
from orthrus.models.sizes import CopyBytes, weight_bytes
from orthrus.runner.pass_memory import PassMemory
from orthrus.runner.registry import load_runner

logger = logging.getLogger(__name__)

_DEFAULT_CPU_CACHE_BYTES = 2 << 30


def choose_device(device: str) -> torch.device:
    """The device that a setting names. "auto" is CUDA if there is a GPU, and else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def choose_page_size(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a page. Raises ConfigError if the device can't use the setting."""
    page_size = config.page_size or (64 if device.type == "cuda" else 16)
    if device.type == "cuda" and page_size % 64:
        raise ConfigError(
            f"page_size {page_size} is too small for a GPU, which reads 64 tokens at a time: leave it out or set it "
            "to 64, 128 or 256"
        )
    return page_size


def cache_pages(
    config: EngineConfig, forward: LayerParallelForward, page_size: int, kv_format: str, max_groups: int
) -> int:
    """Pages of the KV cache, without the padding page. Raises ConfigError if there is no memory for it.

    kv_format: a name in `orthrus.cache.kv_formats`. max_groups: most groups of a sequence in a pass.
    """
    tokens, model = config.kv_cache_tokens, forward.config
    if tokens is None:
        page_bytes = page_size * kv_bytes_per_token(model, forward.dtype.itemsize, kv_format)
        full = (config.max_model_len or model.max_position_embeddings) * config.max_num_seqs
        # One page is for padding.
        fitting = _cache_bytes(config, forward, page_size, kv_format, max_groups) // page_bytes - 1
        tokens = min(full, max(fitting, 1) * page_size)
    return -(-tokens // page_size)


def context_limit(config: EngineConfig, model: ModelConfig, cache_tokens: int) -> int:
    """The context limit in tokens: `max_model_len`, or else the model's limit, lowered to what the cache holds.

    Raises ConfigError if the cache is too small for `max_model_len`.
    """
    wanted, trained = config.max_model_len, model.max_position_embeddings
    if wanted is not None and wanted > cache_tokens:
        raise ConfigError(
            f"the KV cache holds {cache_tokens} tokens, fewer than max_model_len {wanted}: raise kv_cache_tokens "
            f"to {wanted} or lower max_model_len"
        )
    if wanted is None and trained > cache_tokens:
        logger.warning("context limit lowered from %d to the KV cache's %d tokens", trained, cache_tokens)
    return wanted or min(trained, cache_tokens)


def choose_weight_format(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """The weight format of the AR rows' weights. Raises ConfigError if it does not fit the dtype."""
    if not config.keeps_12_bits(model):
        return "plain"
    if device.type != "cuda":
        logger.warning("lossless12 has no effect on a CPU, which keeps all weights in full")
        return "plain"
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"lossless12 needs bfloat16 weights, and the model runs in {name}: set dtype to bfloat16, or use a checkpoint that "
            "is not in lossless12 and set weights to bf16"
        )
    return "lossless12"


def choose_draft_format(
    config: EngineConfig,
    shard: Shard,
    device: torch.device,
    dtype: torch.dtype,
    weights: str = "plain",
    unread: int = 0,
) -> str | None:
    """The weight format of the drafts' own weights; None if they share those of the AR rows.

    Call it before the weights are packed, because it reads how much memory is free. shard: the part of the model on `device`.
    weights: the format of the AR rows' weights. unread: bytes of the weights that will still be loaded, in `dtype`.
    """
    model = shard.config
    if device.type == "cuda" and (shared := shared_format(config, model)) is not None:
        if config.draft_lead:
            logger.warning(
                "draft_lead has no effect: on a GPU, no pass of a quantised model has rows of both views"
            )
        return shared
    if device.type != "cuda" or dtype.itemsize > 2 or not has_fp8_mma():
        return draft_format(config, model)
    if weights == "lossless12" and reads_one_plane(config, model):
        return ONE_PLANE
    free, size = torch.cuda.mem_get_info(device)
    passes = PassMemory.of(shard, pass_room(config, model), dtype.itemsize).total
    memory = size * config.gpu_memory_utilization - (size - free) - unread - passes
    gpu = torch.cuda.get_device_capability(device)
    return draft_format(config, model) or auto_draft_format(config, shard, dtype.itemsize, memory, gpu)


def check_memory(
    config: EngineConfig,
    shard: Shard,
    device: torch.device,
    dtype: torch.dtype,
    medusa: MedusaConfig | None = None,
) -> None:
    """Raise ConfigError, before anything is loaded, if the device has no room for the weights and their copies for drafts.

    shard: the part of the model on `device`. medusa: the Medusa heads that it gets.
    """
    gpu = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    check_draft_weights(config, shard, gpu)
    model = shard.config
    name, size_each = str(dtype).removeprefix("torch."), None
    lossless = config.keeps_12_bits(model) and device.type == "cuda" and dtype == torch.bfloat16
    if lossless:
        name += " in 12 bits"
    if (copies := draft_format(config, model)) is not None:
        # On a CPU, copies have the dtype of the weights. "fp8+int4" has two of each MLP.
        full = CopyBytes((2 if copies == "fp8+int4" else 1) * dtype.itemsize, dtype.itemsize)
        size_each = full if device.type == "cpu" else COPY_BYTES.get(copies)
        if size_each is not None:
            name += f" with {copies} copies for drafts"
    wanted = weight_bytes(shard, dtype.itemsize, size_each, lossless=lossless)
    if medusa is not None:
        wanted += medusa.num_weights * dtype.itemsize
        name += f" with {medusa.medusa_num_heads} Medusa heads"
    if device.type == "cpu":
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if wanted > size:
            raise ConfigError(
                f"the weights of {model.name} need {_gib(wanted)} in {name}, and this machine has {_gib(size)} of memory: "
                "take a smaller model or a larger machine"
            )
    elif device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        if wanted > free:
            smaller = ", or set dtype to bfloat16" if dtype.itemsize > 2 else ""
            raise ConfigError(
                f"the weights of {model.name} need {_gib(wanted)} in {name}, and {_gib(free)} of the GPU's {_gib(size)} are "
                f"free: {_gib(wanted - free)} are missing. Free memory, or take a smaller model or a larger GPU{smaller}"
            )


def _cache_bytes(
    config: EngineConfig, forward: LayerParallelForward, page_size: int, kv_format: str, max_groups: int
) -> int:
    """Memory for the KV cache where no setting says how much."""
    if forward.device.type != "cuda":
        return _DEFAULT_CPU_CACHE_BYTES
    room = pass_room(config, forward.config)
    share = config.gpu_memory_utilization
    torch.cuda.empty_cache()  # Torch still holds memory that packing has freed.
    free, size = torch.cuda.mem_get_info(forward.device)
    # What passes need comes on top of what is in use now.
    passes = load_runner(forward.device, forward.dtype).pass_memory(
        forward, page_size, kv_format, room, max_pages(config, max_groups, room.positions, page_size)
    )
    left = int(size * share) - (size - free) - passes.total
    logger.info("GPU memory: %s in use with the weights, passes need %s", _gib(size - free), passes)
    if left <= 0:
        raise ConfigError(
            f"the model leaves no GPU memory for a KV cache: {_gib(size - free)} are in use with its weights, passes need "
            f"{_gib(passes.total)}, and gpu_memory_utilization {share:g} of {_gib(size)} is {_gib(size * share)}: "
            f"{_gib(-left)} are missing. Raise gpu_memory_utilization, lower max_num_seqs or prefill_chunk, or take a "
            "larger GPU"
        )
    return left


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
