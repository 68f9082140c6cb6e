"""Shapes of the published Qwen3 models, to plan memory and to benchmark without a checkpoint."""

import re
from dataclasses import replace

from orthrus.models.config import ModelConfig

_BLOCK_SIZE, _MASK_TOKEN_ID = 32, 151669


def _qwen3(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    *,
    tied: bool = False,
    vocab_size: int = 151936,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


# From the config.json of Qwen/Qwen3-*. There is no dense Qwen3-72B: its shape is that of Qwen2.5-72B.
QWEN3_SHAPES = {
    "0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "8B": _qwen3(4096, 12288, 36, 32),
    "14B": _qwen3(5120, 17408, 40, 40),
    "32B": _qwen3(5120, 25600, 64, 64),
    "72B": _qwen3(8192, 29568, 80, 64, vocab_size=152064),
}


def published_shape(model: str) -> ModelConfig | None:
    """The shape that a name such as Qwen/Qwen3-4B or chiennv/Orthrus-Qwen3-8B stands for, None for other names."""
    match = re.search(r"(?i)(orthrus-)?qwen3-(\d+(?:\.\d+)?b)", model)
    shape = QWEN3_SHAPES.get(match[2].upper()) if match else None
    if match is None or shape is None:
        return None
    shape = replace(shape, name=match[0])
    return replace(shape, block_size=_BLOCK_SIZE, mask_token_id=_MASK_TOKEN_ID) if match[1] else shape
