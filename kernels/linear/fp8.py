"""The format "fp8": weights and inputs as 8-bit floating-point numbers (e4m3) with float32 scales, half the bytes of bfloat16.

It rounds, so only passes whose results may be rough run in it: drafts, which another pass verifies. It is the fine-grained
format of DeepSeek-V3 (arXiv 2412.19437, section 3.3) and of the Qwen3 FP8 checkpoints. One scale belongs to each block of
128 x 128 weights, and one to each 128 inputs of a row. Every 128 inputs have a sum of their own, which both scales multiply
before it is added to the float32 total. A row's result has the same bits whatever other rows are in the pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.kernels.linear.plain import PlainFormat
from orthrus.kernels.linear.weight import Parameters, Views, Weight, weight_format

BLOCK = 128
"""Inputs, and outputs of a weight, that share a scale."""
LARGEST = 448.0
"""The largest number of e4m3."""
_CHUNK = 32 * BLOCK
"""Outputs of a weight that are rounded at once: float32 copies of more would need much memory."""


@weight_format("fp8")
class Fp8Format:
    """Rounds a layer's weights to e4m3. Biases are kept as they are."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        rounded = [[_rounded(projection) for projection in view] for view in views]
        return RoundedWeight(PlainFormat.pack(rounded, gated=gated, head=head))


class RoundedWeight(Weight):
    """The reference: the numbers of the FP8 format in the dtype of the model, for devices that do not multiply FP8.

    It computes what the FP8 kernels compute, but needs the memory of the unrounded weights.
    """

    def __init__(self, weight: Weight) -> None:
        """weight: the layer with its weights rounded."""
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return self._weight.linear(round_rows(x), num_ar, out)

    def linear_silu_mul(self, x: Tensor, num_ar: Tensor | None = None) -> Tensor:
        return self._weight.linear_silu_mul(round_rows(x), num_ar)


def _rounded(projection: Parameters) -> Parameters:
    """The tensors of a projection, taken out of it, with the weight rounded to what FP8 holds."""
    weight = projection.pop("weight")
    parts = (dequantise_weight(*quantise_weight(part)) for part in weight.split(_CHUNK))
    rounded = {"weight": torch.cat([part.to(weight.dtype) for part in parts])}
    return rounded | ({"bias": projection.pop("bias")} if "bias" in projection else {})


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [outs, ins] as e4m3 numbers [outs, ins] and float32 scales [blocks of outs, blocks of ins].

    A weight is its number times the scale of its block. Blocks at the edges may be smaller than `BLOCK` x `BLOCK`.
    """
    blocks = _blocks(_blocks(weight.float(), 1), 0)
    scales = _scales(blocks.abs().amax((1, 3)))
    numbers = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return numbers[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn), scales


def dequantise_weight(numbers: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [outs, ins] that `quantise_weight` gave the numbers and scales of."""
    outs, ins = numbers.shape
    wide = scales.repeat_interleave(BLOCK, 0)[:outs].repeat_interleave(BLOCK, 1)[:, :ins]
    return numbers.float() * wide


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, ins] as e4m3 numbers [rows, ins] and float32 scales [rows, blocks of ins]."""
    blocks = _blocks(x.float(), 1)
    scales = _scales(blocks.abs().amax(2))
    numbers = (blocks / scales[:, :, None]).flatten(1)
    return numbers[:, : x.shape[1]].to(torch.float8_e4m3fn), scales


def round_rows(x: Tensor) -> Tensor:
    """x [rows, ins] with each number rounded to what FP8 holds, in x's dtype."""
    numbers, scales = quantise_rows(x)
    return (numbers.float() * scales.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]).to(x.dtype)


def _scales(largest: Tensor) -> Tensor:
    """The scales of blocks whose largest numbers are these, in magnitude. A block of zeros has scale 1."""
    return torch.where(largest > 0, largest / LARGEST, 1.0)


def _blocks(x: Tensor, dim: int) -> Tensor:
    """x with dimension `dim` divided in two, [blocks, BLOCK], and zeros where the last block is not full."""
    missing = -x.shape[dim] % BLOCK
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
    return x.unflatten(dim, (-1, BLOCK))
