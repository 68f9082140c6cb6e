"""Helpers for tests that compare `orthrus.accelerate` with Hugging Face's `generate`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen3ForCausalLM,
)

import orthrus
from orthrus.generate.accelerated import AcceleratedModel

VOCAB = 128
PAD = 3
PROMPT = torch.tensor([[11, 42, 7, 99, 23, 64]])
# Three prompts of different lengths, padded on the left, with a pad id that also occurs as a token.
BATCH = torch.tensor([[PAD, PAD, PAD, 5, 9], [PAD, 17, 81, 33, 2], [8, 6, PAD, 55, 101]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def load_reference(path: Path) -> Qwen3ForCausalLM:
    """The AR view as Hugging Face runs it, in float32."""
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def accelerated(path: Any, **settings: Any) -> AcceleratedModel:
    # Fixed draft lengths, so that tokens per cycle do not depend on the machine's speed.
    defaults: dict[str, Any] = {"adaptive_draft": False, "kv_cache_tokens": 4096, "device": "cpu"}
    return orthrus.accelerate(path, **(defaults | settings))


def assert_same(model: AcceleratedModel, reference: Qwen3ForCausalLM, *args: Any, **kwargs: Any) -> Tensor:
    """Assert that both generate the same, including shape and dtype, and return it."""
    expected = reference.generate(*args, **kwargs)
    result = model.generate(*args, **kwargs)
    assert result.dtype == expected.dtype
    assert result.tolist() == expected.tolist()
    return result
