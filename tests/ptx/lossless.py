"""Cases of the stream kernel for 12-bit weights (kernels/linear/lossless_hopper.py)."""

from typing import Any

import torch
from torch import Tensor

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import lossless_hopper
from orthrus.kernels.linear.lossless import pack_lossless
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.types import DenseLayer, LosslessLayer
from tests.ptx import linear
from tests.ptx.launches import Edit, emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, gated, int32, randn, unset


def launch(
    way: Way, x: Tensor, layer: LosslessLayer, out: Tensor, *args: Any,
    programs: int = 2, edit: Edit | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """`lossless_hopper.launch`. Nothing may touch inputs and outputs before griddepcontrol.wait."""
    with emulating(lossless_hopper, way, programs=programs, chained=(x, out), edit=edit):
        lossless_hopper.launch(x, layer, out, *args, **kwargs)


def make_layer(
    outs: int, ins: int, views: int = 1, *, gated: bool = False, exceptions: int = 0, bias: bool = False
) -> tuple[LosslessLayer, DenseLayer, DenseWeight]:
    """A packed layer, the layer that it is made of, and the same in float64.

    exceptions: how many weights that 12 bits do not hold are put into two of three tiles.
    """
    weight = (randn(views, outs, ins, seed=3, dtype=torch.float32) * 0.02).bfloat16()
    for number in range(exceptions):
        for tile in range(outs // 64):
            for step in range(ins // 128):
                if (tile + step) % 3 != 2:
                    out, place = tile * 64 + (number * 7 + tile) % 64, step * 128 + (number * 37 + step) % 128
                    weight[number % views, out, place] = [3e-9, -7.0, 0.0, 5.0][number % 4]
    biases = randn(views, outs, seed=5) if bias else None
    layer = DenseLayer(weight.unbind(), biases, gated)
    packed = pack_lossless(layer)
    assert not exceptions or int(packed.exceptions[..., 0].max()) >= min(exceptions, 5)
    exact = DenseWeight(weight.double().unbind(), None if biases is None else biases.double())
    return packed, layer, exact


def check_layer(
    way: Way, rows: int, views: int, ins: int, exceptions: int, *, edit: Edit | None = None
) -> None:
    packed, _, exact = make_layer(192, ins, views, exceptions=exceptions, bias=True)
    x, num_ar = randn(rows, ins, seed=2), int32(rows // 2)
    out = unset(rows, 192)
    launch(way, x, packed, out, num_ar, 1, edit=edit)
    check(out, exact.linear(x.double(), num_ar))


def check_bits(way: Way, rows: int) -> None:
    """They are those of the kernel for bfloat16 weights."""
    packed, layer, _ = make_layer(192, 1024, exceptions=4)
    x = randn(rows, 1024, seed=2)
    out, plain = unset(rows, 192), unset(rows, 192)
    launch(way, x, packed, out, None, 1)
    linear.launch(way, x, layer, plain, None, 1)
    assert torch.equal(out, plain)


def check_gated(way: Way) -> None:
    packed, _, exact = make_layer(256, 896, gated=True, exceptions=3)
    x = randn(20, 896, seed=2)
    out = unset(20, 128)
    launch(way, x, packed, out, None, 1)
    check(out, gated(exact.linear(x.double())))


def check_tree(way: Way, leaves: int, first: int, count: int, parts: int) -> None:
    """With 16 leaves of 11 steps some leaves are empty."""
    whole, rows = Leaves(11 * 128, 128, leaves, first, count), 16
    ins = whole.end - whole.begin
    packed, _, exact = make_layer(128, ins, 2, exceptions=3)
    x = randn(rows, ins, seed=2)
    out = unset(parts, rows, 128, dtype=torch.float32) if parts > 1 else unset(rows, 128)
    launch(way, x, packed, out, int32(7), parts, inputs=whole)
    linear.check_parts(out, exact, x.double(), whole, parts)
