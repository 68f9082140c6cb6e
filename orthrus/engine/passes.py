"""The model of an engine, its runner, and single passes for whoever measures what passes cost."""

import logging
import time

from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.engine.config import EngineConfig
from orthrus.engine.sizing import PassLimits, choose_draft_format
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup
from orthrus.requests.request import SamplingParams
from orthrus.runner.protocol import ModelRunner
from orthrus.runner.registry import load_runner
from orthrus.runner.sampler import PickRows

logger = logging.getLogger(__name__)

_PASSES_AHEAD = 2
"""How many passes are timed together where one is launched ahead of the other."""


def make_forward(
    config: EngineConfig, model: ModelConfig, weights: dict[str, Tensor]
) -> LayerParallelForward:
    """The model, with copies of its weights for drafts where `config.draft_weights` asks for them. `weights` is emptied."""
    embedding = weights[family_of(model).embedding]
    copies = choose_draft_format(config, model, embedding.device, embedding.dtype)
    forward = LayerParallelForward(model, weights, draft_format=copies)
    if forward.draft is not None:
        gib = [stack.nbytes / (1 << 30) for stack in (forward.draft, forward.exact)]
        logger.info("draft_weights %s: %.2f GiB of copies beside weights of %.2f GiB", copies, *gib)
    return forward


def make_runner(
    forward: LayerParallelForward, cache: KVCache, config: EngineConfig, max_model_len: int, max_groups: int
) -> ModelRunner:
    """The runner for the device and dtype of `forward`, with room for the largest pass that `config` allows.

    max_model_len: the context limit in tokens. max_groups: most groups of a sequence in a pass.
    """
    limits = PassLimits.of(config)
    return load_runner(forward.device, forward.dtype).build(
        forward,
        cache,
        max_rows=limits.max_rows,
        max_logits=limits.max_logits,
        max_pages=max_groups * config.max_num_seqs * -(-max_model_len // cache.page_size),
    )


def time_pass(runner: ModelRunner, groups: list[RowGroup], temperature: float, ahead: bool) -> float:
    """Seconds of a pass whose picks all have the same temperature.

    ahead: several such passes are run, and each is launched before the picks of the one before it are read, if the runner can.
    So the time of the host counts only where the device waits for it, as in the engine.
    """
    params = SamplingParams(temperature=temperature)
    rows = [PickRows(params, seed=0, position=1, count=g.num_logits) for g in groups if g.num_logits]
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
