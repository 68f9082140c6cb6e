"""`CodeWeight`: a layer in 4-bit codes on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus.kernels.int4_sizes import GROUP, TILE_INS, TILE_OUTS
from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import codes_hopper
from orthrus.kernels.linear.codes import Codes, pack_codes, pack_tables
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.gpu import FixedInputsWeight
from orthrus.kernels.linear.plain import alternate
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.types import CodeLayer, LinearTiles
from orthrus.kernels.rounding import Rounding

_CHUNK = 1024
"""Outputs of a weight that are packed at once. Packing makes 64-bit copies, which would need much memory for all of them."""


@dataclass(frozen=True)
class CodeWeight(CodeLayer, FixedInputsWeight):
    """Weights in 4-bit codes. One kernel runs them with any number of rows."""

    split: Split | None = None

    @property
    def views(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def _num_parts(self, rows: int, outs: int, ins: int) -> int:
        return codes_hopper.num_parts(rows, outs, ins)

    def _streams(self, x: Tensor) -> bool:
        return True

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
        assert not picking, "an LM head has another format"
        codes_hopper.launch(self._inputs(x), self, out, parts, rounding)

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
        raise AssertionError("the kernel for 4-bit codes chooses its tiles itself")


def code_layer(
    weight: Codes, bias: Tensor | None, gated: bool, split: Split | None, dtype: torch.dtype
) -> CodeWeight:
    """A layer of these codes. bias: [outs]. gated: whether the outputs are all of a gate and then all of up.

    split: which part of a layer it is; None for a whole layer. dtype: the model's.
    """
    # As bytes, because some operations do not take FP8 tensors.
    codes, tables, scales = weight.codes, weight.tables.view(torch.uint8), weight.scales
    if gated:
        codes, tables, scales = (alternate(part) for part in (codes, tables, scales))
        bias = None if bias is None else alternate(bias)
    outs, ins = codes.shape
    more_outs, more_ins = -outs % TILE_OUTS, -ins % TILE_INS
    codes = pad(codes, (0, more_ins, 0, more_outs))
    # Tables of zeros, so that it does not matter which codes are behind the last output and input.
    tables = pad(tables, (0, 0, 0, more_ins // GROUP, 0, more_outs))
    return CodeWeight(
        torch.cat([pack_codes(part) for part in codes.split(_CHUNK)]),
        pack_tables(tables),
        scales[None],
        None if bias is None else bias[None],
        gated,
        split,
        rounding=UNSCALED,
        result_dtype=dtype,
    )
