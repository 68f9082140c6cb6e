"""How a model is divided among ranks: the parts make up the whole, and the leaves don't depend on the number of ranks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import family_of, load_config
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Axis, Shard, check_ranks, num_leaves
from tests.checkpoints import make_checkpoint

AXES: tuple[Axis, ...] = ("queries", "keys", "inner", "vocabulary")


@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_leaves_of_published_shapes(shape: str) -> None:
    """Two leaves by default, up to eight on request; all ranks' leaves are those of one rank, and differ by a unit at most."""
    model = QWEN3_SHAPES[shape]
    assert num_leaves(model) == 2
    model = replace(model, sum_leaves=8)
    for axis in AXES:
        whole = Shard(model).leaves(axis)
        lengths = [span.stop - span.start for span in whole.spans]
        assert (sum(lengths), len(lengths)) == (whole.width, 8)
        assert max(lengths) - min(lengths) <= whole.unit
        for size in (2, 4, 8):
            check_ranks(model, size)
            parts = [Shard(model, rank, size).leaves(axis) for rank in range(size)]
            spans = [
                (part.begin + span.start, part.begin + span.stop) for part in parts for span in part.spans
            ]
            assert spans == [(span.start, span.stop) for span in whole.spans]


def test_finer_leaves_have_the_ends_of_coarser_ones() -> None:
    ends = {}
    for leaves in (2, 4, 8):
        shard = Shard(replace(QWEN3_SHAPES["72B"], sum_leaves=leaves))
        ends[leaves] = [span.stop for span in shard.leaves("inner").spans]
    assert ends[2] == ends[4][1::2] == ends[8][3::4]


def test_a_rank_loads_its_part(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path,
        vocab_size=300,
        intermediate_size=300,
        heads=4,
        kv_heads=4,
        head_dim=64,
        tie=False,
        bias=True,
    )
    model = replace(load_config(path), sum_leaves=4)
    family, size = family_of(model), 4
    whole = load_weights(path, model, "cpu", torch.float32)
    parts = [
        load_weights(path, model, "cpu", torch.float32, Shard(model, rank, size)) for rank in range(size)
    ]
    divided = 0
    for name, tensor in whole.items():
        division = family.division(name)
        if division is None:
            assert all(torch.equal(part[name], tensor) for part in parts)
        else:
            divided += 1
            assert torch.equal(torch.cat([part[name] for part in parts], division.dim), tensor)
    # By layer: q, k, v and their biases and o, in two views, and gate, up and down; and the head.
    assert divided == model.num_hidden_layers * (2 * 7 + 3) + 1


def test_what_can_not_be_divided_is_refused() -> None:
    model = replace(QWEN3_SHAPES["8B"], num_key_value_heads=2)
    assert num_leaves(model) == 2
    with pytest.raises(ConfigError, match=r"can't be shared by 8 ranks, with 2 key heads, .* to 1 or 2$"):
        check_ranks(replace(model, sum_leaves=8), 2)
    with pytest.raises(ConfigError, match="set sum_leaves to 4"):
        check_ranks(QWEN3_SHAPES["8B"], 4)
