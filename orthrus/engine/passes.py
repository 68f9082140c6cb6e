"""Builds the model, the KV cache and the runner of an engine, and measures the time of single passes."""

import logging
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.cache.kv_formats import DEFAULT_KV_FORMAT
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import COPY_BYTES, smallest_copies
from orthrus.engine.pass_limits import PassLimits, exchange_sizes, max_pages
from orthrus.engine.sizing import (
    cache_pages,
    choose_draft_format,
    choose_page_size,
    choose_weight_format,
    context_limit,
)
from orthrus.kernels.ranks import ONE_RANK, Ranks
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.forward import LayerParallelForward
from orthrus.models.shard import Shard
from orthrus.models.sizes import weight_bytes
from orthrus.plan import MAX_RANKS, RowGroup
from orthrus.requests.request import SamplingParams
from orthrus.runner.protocol import ModelRunner, RankRunner, RunnerLimits
from orthrus.runner.registry import load_runner
from orthrus.runner.sampler import PickRows

logger = logging.getLogger(__name__)

_PASSES_AHEAD = 2
"""How many passes are timed together if each is launched before the one before it has ended."""


@dataclass(frozen=True)
class LoadedModel:
    """What runs the passes of an engine. Where several ranks share the model, each has one of these."""

    forward: LayerParallelForward
    cache: KVCache
    runner: RankRunner
    num_pages: int
    """Pages of the cache, without the padding page."""
    max_model_len: int
    """The context limit in tokens."""

    @staticmethod
    def build(
        config: EngineConfig,
        model: ModelConfig,
        weights: MutableMapping[str, Tensor],
        ranks: Ranks,
        max_groups: int,
    ) -> "LoadedModel":
        """model: the whole model. weights: this rank's part of them; the mapping is emptied. max_groups: see `make_runner`.

        Raises ConfigError if there is no memory for a cache, or less than the settings ask for. Raises RankError as soon as
        another rank has failed. Otherwise its GPU would be waited for in the first passes, and while graphs are captured.
        """
        loaded = ranks.watched(lambda: LoadedModel._build(config, model, weights, ranks, max_groups))
        if loaded.forward.device.type == "cuda":
            # `watched` may have built it in another thread, so set the device in this one too.
            torch.cuda.set_device(loaded.forward.device)
        return loaded

    @staticmethod
    def _build(
        config: EngineConfig,
        model: ModelConfig,
        weights: MutableMapping[str, Tensor],
        ranks: Ranks,
        max_groups: int,
    ) -> "LoadedModel":
        forward = make_forward(config, model, weights, ranks)
        if forward.device.type == "cuda":
            torch.cuda.set_device(forward.device)
            if ranks.size > 1:
                _share_memory(config, forward)
        page_size = choose_page_size(config, forward.device)
        num_pages = ranks.least(cache_pages(config, forward, page_size, DEFAULT_KV_FORMAT, max_groups))
        max_model_len = context_limit(config, model, num_pages * page_size)
        forward.use_context(max_model_len)
        cache = KVCache.allocate(
            forward.config,
            num_pages + 1,
            page_size,
            forward.device,
            forward.dtype,
            DEFAULT_KV_FORMAT,
        )
        runner = make_runner(forward, cache, config, max_model_len, max_groups)
        return LoadedModel(forward, cache, runner, num_pages, max_model_len)


def _share_memory(config: EngineConfig, forward: LayerParallelForward) -> None:
    """Share memory among the GPUs of all ranks, as much as the largest pass exchanges."""
    sizes = exchange_sizes(config, forward.config)
    forward.ranks.share_memory(forward.device, replace(sizes, picks=MAX_RANKS * sizes.logit_rows))


def make_forward(
    config: EngineConfig, model: ModelConfig, weights: MutableMapping[str, Tensor], ranks: Ranks = ONE_RANK
) -> LayerParallelForward:
    """The model, with copies of its weights for drafts where `config.draft_weights` asks for them. `weights` is emptied."""
    family = family_of(model)
    embedding = weights[family.embedding]
    part = Shard(model, ranks.rank, ranks.size)
    kept = choose_weight_format(config, model, embedding.device, embedding.dtype)
    unread = 0
    if not isinstance(weights, dict):
        # Of `LazyTensors`, these two are loaded now, and the layers later.
        read = [weights[name] for name in (family.embedding, family.head) if name in weights]
        unread = weight_bytes(part, embedding.itemsize) - sum(tensor.nbytes for tensor in read)
    copies = choose_draft_format(config, part, embedding.device, embedding.dtype, kept, unread)
    copies = smallest_copies(config, copies, ranks.least)
    forward = LayerParallelForward(model, weights, kept, copies, ranks)
    if kept == "lossless12":
        logger.info("weights lossless12: linear layers of %.2f GiB", forward.exact.nbytes / (1 << 30))
    if forward.draft is not None and copies in COPY_BYTES:
        gib = [stack.nbytes / (1 << 30) for stack in (forward.draft, forward.exact)]
        logger.info("draft_weights %s: %.2f GiB of copies beside weights of %.2f GiB", copies, *gib)
    return forward


def make_runner(
    forward: LayerParallelForward, cache: KVCache, config: EngineConfig, max_model_len: int, max_groups: int
) -> RankRunner:
    """The runner for the device and dtype of `forward`, with room for the largest pass that `config` allows.

    max_model_len: the context limit in tokens. max_groups: most groups of a sequence in a pass.
    """
    passes = PassLimits.of(config)
    limits = RunnerLimits(
        passes.max_rows,
        passes.max_logits,
        max_pages(config, max_groups, max_model_len, cache.page_size),
        wants_ranks=config.wants_trees,
    )
    return load_runner(forward.device, forward.dtype).build(forward, cache, limits)


def time_pass(runner: ModelRunner, groups: list[RowGroup], temperature: float, ahead: bool) -> float:
    """How many seconds a pass takes. All its picks have the same temperature.

    ahead: run several such passes, and launch each before the picks of the one before it are read, if the runner can. Then the
    host's time counts only where the device waits for the host, as in the engine.
    """
    params = SamplingParams(temperature=temperature)
    rows = [
        PickRows(params, seed=0, position=1, count=g.num_logits, heads=g.heads)
        for g in groups
        if g.num_logits
    ]
    begin = time.perf_counter()
    if not (ahead and runner.feeds_tokens):
        runner.launch(groups, rows).picks()
        return time.perf_counter() - begin
    last = runner.launch(groups, rows)
    for number in range(_PASSES_AHEAD):
        following = runner.launch(groups, rows)
        last.picks()
        if number == 0:
            begin = time.perf_counter()
        last = following
    last.picks()
    return (time.perf_counter() - begin) / _PASSES_AHEAD
