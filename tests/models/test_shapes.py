"""The shapes of published models, which benches and memory plans take."""

import pytest
import torch

from orthrus.models.shapes import QWEN3_SHAPES, published_shape
from orthrus.models.shard import Shard
from orthrus.models.sizes import weight_bytes


def test_published_shapes_have_the_published_sizes() -> None:
    billions = {
        size: weight_bytes(Shard(shape), torch.bfloat16.itemsize) / 2 / 1e9
        for size, shape in QWEN3_SHAPES.items()
    }
    expected = {
        "0.6B": 0.596,
        "1.7B": 1.72,
        "4B": 4.02,
        "8B": 8.19,
        "14B": 14.77,
        "32B": 32.76,
        "72B": 72.7,
    }
    assert billions == pytest.approx(expected, rel=0.005)
    plain, orthrus = published_shape("Qwen/Qwen3-8B"), published_shape("chiennv/Orthrus-Qwen3-8B")
    assert plain is not None and not plain.has_diffusion
    assert orthrus is not None and orthrus.has_diffusion and orthrus.name == "Orthrus-Qwen3-8B"
    # The paper: the diffusion view adds 16 to 17 % of parameters.
    assert (
        1.15
        < weight_bytes(Shard(orthrus), torch.bfloat16.itemsize)
        / weight_bytes(Shard(plain), torch.bfloat16.itemsize)
        < 1.19
    )
    assert published_shape("Qwen/Qwen3-3B") is None and published_shape("models/orthrus-tiny") is None
