"""Arguments of the linear kernels: the weights of a layer as plain tensors, and how a launch is cut into tiles."""

from dataclasses import dataclass

from torch import Tensor

GATE_BLOCK = 8
"""An interleaved layer has this many outputs of the gate, then as many of up, and so on. Two outputs that are this far apart are
in the same thread after an instruction of the tensor cores."""


def _bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of those tensors that a layer has."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer as plain tensors. Its weights have the dtype of its inputs, or are FP8 numbers with scales (see `fp8`)."""

    # One [out_features, in_features] for each view (AR, diffusion). On a GPU they are contiguous in memory, in this order.
    weights: tuple[Tensor, ...]
    # [views, out_features], or None.
    bias: Tensor | None = None
    # Whether the outputs alternate between a gate and up in blocks of `GATE_BLOCK`, for `linear_silu_mul` on a GPU.
    interleaved: bool = False
    # The scales of FP8 weights, one for each output: float32 [views, out_features]. None for other weights.
    scales: Tensor | None = None

    @property
    def outs(self) -> int:
        """Outputs of one view."""
        return self.weights[0].shape[0]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the weights, the bias and the scales."""
        return _bytes_of(*self.weights, self.bias, self.scales)


@dataclass(frozen=True)
class GroupedLayer:
    """A linear layer of one view whose weights have a scale for each output of a group of inputs (see `grouped_triton`)."""

    # The weights. FP8 (e4m3) or 8-bit integers are [outs, ins]. 4-bit integers are packed in int32 [outs, ins / 8], see
    # `integers.pack_words`.
    numbers: Tensor
    # float [groups, outs].
    scales: Tensor
    # The zero points of integers: uint8 or int16 [groups, outs]. None for FP8.
    zeros: Tensor | None
    # [outs], or None.
    bias: Tensor | None
    # Inputs that share a scale: a multiple of `depth`.
    group_size: int
    # Inputs of a step of the sum.
    depth: int
    # Bits of a weight: 4 or 8 for integers, 0 for FP8.
    bits: int
    # As in `DenseLayer`.
    interleaved: bool = False
    # For GPTQ's `desc_act`: the index of the input of each column of `numbers`, int64 [ins]. None: they are in order.
    order: Tensor | None = None

    @property
    def outs(self) -> int:
        return self.numbers.shape[0]

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs are rounded to FP8, with a scale for each 128 of a row: for FP8 weights."""
        return self.zeros is None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return _bytes_of(self.numbers, self.scales, self.zeros, self.bias, self.order)


@dataclass(frozen=True)
class CodeLayer:
    """A linear layer of one view whose weights are 4-bit codes with a table for each output's group of inputs (see `codes`).

    Outputs are padded to whole tiles of 64, and inputs to whole steps of 256.
    """

    # int32 [tiles * steps * 8, 256]: see `codes.pack_codes`.
    codes: Tensor
    # int32 [tiles * steps, 256]: see `codes.pack_tables`.
    tables: Tensor
    # What the sums of an output are multiplied by: float32 [1, outs].
    scales: Tensor
    # [views, outs], or None.
    bias: Tensor | None = None
    # As in `DenseLayer`.
    interleaved: bool = False

    @property
    def outs(self) -> int:
        """Outputs of the layer, without padding."""
        return self.scales.shape[1]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return _bytes_of(self.codes, self.tables, self.scales, self.bias)


@dataclass(frozen=True)
class LosslessLayer:
    """A linear layer whose bfloat16 weights are packed losslessly in 12 bits (see `lossless`).

    The outputs of all views are one dimension of views * outs, in the order of the views.
    """

    # Sign, exponent over the row's base and 3 bits of mantissa: int32 [views * outs, ins / 4], four inputs a word.
    high: Tensor
    # The other 4 bits of mantissa: int32 [views * outs, ins / 8], see `integers.pack_words`.
    low: Tensor
    # Weights that `high` and `low` do not hold: int32 [views * outs / 64, ins / 128, 32]. Each tile of 64 outputs and 128 inputs
    # has a list: their number, and then for each of them value << 16 | index in the tile, sorted by index. Unused entries are 0.
    exceptions: Tensor
    # What the sums of an output are multiplied by, a power of two: float32 [views, outs].
    scales: Tensor
    # [views, outs], or None.
    bias: Tensor | None = None
    # As in `DenseLayer`.
    interleaved: bool = False

    @property
    def outs(self) -> int:
        """Outputs of one view."""
        return self.scales.shape[1]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return _bytes_of(self.high, self.low, self.exceptions, self.scales, self.bias)


@dataclass(frozen=True)
class LinearTiles:
    """How a launch is cut into tiles. This changes no bit of the result, except with FP8 weights of one scale per output (`fp8`).

    There `split` decides bits, because the sum of each part is multiplied by the scales before the parts are added.
    """

    # Outputs of a tile.
    outs: int
    # Input rows of a tile.
    rows: int
    # Inputs of a step. The kernels of `GroupedLayer` use the layer's own depth instead.
    depth: int
    # Whether several programs share the leaves of a sum (split-K).
    split: bool = False
    # Warps of a program.
    warps: int = 4
    # Stages of the software pipeline (Triton's num_stages).
    stages: int = 4
