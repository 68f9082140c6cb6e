"""Time to the first token of a fresh prompt, compared with its arithmetic at the rate of cuBLAS."""

import random
import statistics
import time
from collections.abc import Sequence

import torch

from orthrus.engine import Engine
from orthrus.measure.shape_report import PromptTime
from orthrus.models.config import ModelConfig
from orthrus.requests.request import SamplingParams

_TIMES = 3
"""How often each length is timed, after a first time that does not count."""
_SIZE = 8192
"""Rows and columns of the matrices whose product gives the rate."""


def prompt_times(engine: Engine, lengths: Sequence[int], rate: float) -> list[PromptTime]:
    """Time a prompt of each length that fits the context: random tokens, alone in the engine. rate: from `matmul_rate`."""
    rng, found = random.Random(1), []
    for length in lengths:
        if length >= engine.max_model_len:
            continue
        seconds = []
        for _ in range(1 + _TIMES):
            prompt = [rng.randrange(engine.model_config.vocab_size) for _ in range(length)]
            begin = time.perf_counter()
            engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds[1:])
        found.append(
            PromptTime(length, median * 1e3, median * rate / prompt_operations(engine.model_config, length))
        )
    return found


def prompt_operations(model: ModelConfig, tokens: int) -> float:
    """Floating-point operations of the AR view's layers over a prompt: linear layers, and attention to earlier tokens."""
    heads = model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    weights = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)
    return model.num_hidden_layers * (2.0 * weights * tokens + 2.0 * heads * tokens * tokens)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on a GPU."""
    left, right = (torch.randn(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        left @ right
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2.0 * _SIZE**3 / statistics.median(seconds)
