"""The format "fp8": weights and inputs as 8-bit floating-point numbers (e4m3) with float32 scales, half the bytes of bfloat16.

It rounds, so only drafts use it, which another pass verifies. Each output of a weight has a scale, and the inputs of a layer have
a fixed factor (see `rounding`). Scales of blocks of 128 x 128 weights would be finer, but then sums must leave the tensor cores
every 128 inputs to be scaled. The tensor cores add FP8 products with fewer bits than float32 has, which is exact enough for
drafts. A row's result has the same bits whatever other rows are in the pass.
"""

import torch
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma, runs_triton
from orthrus.kernels.linear.plain import alternate, join_views
from orthrus.kernels.linear.rounded import pack_rounded
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.types import DenseLayer
from orthrus.kernels.linear.weight import Views, Weight, weight_format
from orthrus.kernels.rounding import LARGEST, Rounding

UNSCALED = Rounding(1.0)
"""The rounding of a layer's inputs until it is given another factor: see `Weight.with_factor`."""
_CHUNK = 4096
"""Outputs of a weight that are rounded at once: float32 copies of more would need much memory."""


@weight_format("fp8")
class Fp8Format:
    """Rounds a layer's weights to e4m3. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        return _pack(views, None, gated, head)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. A rank's scales are those of its own part of a row, and not of the whole row.

        So drafts may differ with the number of ranks. The text does not differ, since another pass verifies drafts.
        """
        return _pack(views, split, gated, head)


def _pack(views: Views, split: Split | None, gated: bool, head: bool) -> Weight:
    if runs_triton(views[0][0]["weight"]) and has_fp8_mma():
        return _pack_for_gpu(views, gated, split)
    return pack_rounded(views, _round_weight, UNSCALED, split, gated=gated, head=head)


def _pack_for_gpu(views: Views, gated: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.gpu import TritonWeight

    dtype = views[0][0]["weight"].dtype
    layer = quantise_layer(views, gated)
    return TritonWeight(
        layer.weights,
        layer.bias,
        layer.interleaved,
        layer.scales,
        split,
        rounding=UNSCALED,
        result_dtype=dtype,
    )


def quantise_layer(views: Views, gated: bool) -> DenseLayer:
    """A layer's weights as e4m3 numbers with scales, in the order in which the FP8 kernels take them.

    Raises ValueError if only one of two views has biases.
    """
    weights, bias = join_views(views)
    if gated:
        weights = [alternate(weight) for weight in weights]
        bias = None if bias is None else torch.stack([alternate(own) for own in bias])
    # As bytes, because some operations do not take FP8 tensors.
    parts = [[quantise_rows(part) for part in weight.split(_CHUNK)] for weight in weights]
    numbers = torch.stack([torch.cat([n.view(torch.uint8) for n, _ in view]) for view in parts])
    return DenseLayer(
        numbers.view(torch.float8_e4m3fn).unbind(),
        bias,
        gated,
        torch.stack([torch.cat([scales for _, scales in view]) for view in parts]),
    )


def _round_weight(weight: Tensor) -> Tensor:
    """weight [outs, ins] with its numbers rounded to e4m3 with a scale for each output."""
    return torch.cat([round_rows(part) for part in weight.split(_CHUNK)])


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, ins] as e4m3 numbers [rows, ins] and float32 scales [rows]: x is about the numbers times the scales.

    The largest number of a row, in magnitude, is `LARGEST`. A row of zeros has scale 1.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True)
    # No less than 2**-100, so that its inverse is finite.
    full = torch.where(largest > 0, largest, LARGEST).clamp(min=2.0**-100)
    # One division a row, because a GPU divides slowly; "LARGEST / full" would round twice.
    return (wide * (torch.full_like(full, LARGEST) / full)).to(torch.float8_e4m3fn), (
        full * (1 / LARGEST)
    ).squeeze(1)


def round_rows(x: Tensor) -> Tensor:
    """Weights x [rows, ins] rounded as `quantise_rows` does, in x's dtype."""
    numbers, scales = quantise_rows(x)
    return (numbers.float() * scales[:, None]).to(x.dtype)
