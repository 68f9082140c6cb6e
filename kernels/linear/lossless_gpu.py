"""`LosslessWeight`: a layer in 12 bits on a GPU, and which kernel multiplies it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import lossless_hopper, triton
from orthrus.kernels.linear.gpu import GpuWeight, TritonWeight
from orthrus.kernels.linear.lossless import PLANE_SCALE
from orthrus.kernels.linear.lossless_triton import lossless_tiles, widen_layer
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.tiles import choose_tiles
from orthrus.kernels.linear.types import LinearTiles, LosslessLayer
from orthrus.kernels.rounding import Rounding

MOST_PACKED_ROWS = 64
"""The most rows for which `lossless_triton` widens the weights itself. For more rows that takes longer than writing the layer out
in bfloat16 first. (H200, layers of Qwen3-8B, 128 rows: 2.4 times the time of the kernel for bfloat16 weights.)"""


@dataclass(frozen=True)
class LosslessWeight(LosslessLayer, GpuWeight):
    """Weights in 12 bits. Each operation gives the bits that `TritonWeight` gives with the same weights in bfloat16.

    With more rows than the stream kernel or `lossless_triton` takes, the layer is first written out in bfloat16, to memory that
    is freed afterwards.
    """

    split: Split | None = None
    # Whether it is the LM head. It is never written out in bfloat16, because it is large and has few rows in a pass.
    head: bool = False

    @property
    def views(self) -> int:
        return self.scales.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def _streams(self, x: Tensor) -> bool:
        return lossless_hopper.streams(x)

    def _stream(
        self,
        x: Tensor,
        out: Tensor,
        num_ar: Tensor | None,
        parts: int,
        picking: tuple[Tensor, ...],
        inputs: Leaves | None,
        rounding: Rounding | None,
    ) -> None:
        lossless_hopper.launch(x, self, out, num_ar, parts, picking, inputs, self._first_token)

    def _tile(
        self,
        x: Tensor,
        out: Tensor,
        num_ar: Tensor | None,
        parts: int,
        tiles: LinearTiles | None,
        inputs: Leaves | None,
        rounding: Rounding | None,
    ) -> None:
        tiles = tiles or self._choose_tiles(x.shape[0], 1)
        layer = widen_layer(self) if self._is_widened(x.shape[0]) else self
        triton.launch(x, layer, out, num_ar, parts, tiles, inputs=inputs)

    def _choose_tiles(self, rows: int, leaves: int) -> LinearTiles:
        if self._is_widened(rows):
            return choose_tiles(rows, self.outs, leaves, self.dtype)
        return lossless_tiles(rows, leaves)

    def rough(self) -> "LosslessWeight | TritonWeight":
        """The first plane alone, whose numbers are FP8, where the GPU multiplies these."""
        if not has_fp8_mma():
            return self
        outs, ins = self.outs, self.high.shape[1] * 4
        numbers = self.high.view(torch.float8_e4m3fn).view(self.views, outs, ins)
        return TritonWeight(
            numbers.unbind(),
            self.bias,
            self.interleaved,
            self.scales * PLANE_SCALE,
            self.split,
            rounding=Rounding(1.0, words=True),
            result_dtype=torch.bfloat16,
        )

    def _is_widened(self, rows: int) -> bool:
        """Whether the layer is written out in bfloat16 for this number of rows."""
        return rows > MOST_PACKED_ROWS and not self.head
