"""The format "fp8+int4": a layer in both formats. Few rows multiply the one in 4 bits, and many rows the one in FP8.

With few rows a layer takes as long as reading its weights, and 4 bits are read sooner. With many rows it takes as long as the
tensor cores, and looking up what codes stand for comes on top, once for each tile of rows.

So a row's result depends on the number of rows in the pass. Only drafts may use this format. Another pass verifies them, so the
text does not depend on it.
"""

from torch import Tensor

from orthrus.kernels.linear.fp8 import Fp8Format
from orthrus.kernels.linear.int4 import Int4Format
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Views, Weight, weight_format
from orthrus.kernels.rounding import Rounding

MOST_ROWS = 128
"""The most rows that multiply the layer in 4 bits. (H200, layers of Qwen3-8B: at 128 rows a pass took 0.97 of the time in FP8, at
256 rows 1.04.)"""


@weight_format("fp8+int4")
class ByRowsFormat:
    """Packs a layer in both formats."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Raises ValueError for layers whose inputs are not a multiple of 128."""
        copy = [[dict(parameters) for parameters in view] for view in views]
        few = Int4Format.pack(copy, gated=gated, head=head)
        return ByRowsWeight(few, Fp8Format.pack(views, gated=gated, head=head))

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Each rank rounds its own part of a layer. Raises ValueError as `pack` does."""
        copy = [[dict(parameters) for parameters in view] for view in views]
        few = Int4Format.pack_split(copy, split, gated=gated, head=head)
        return ByRowsWeight(few, Fp8Format.pack_split(views, split, gated=gated, head=head))


class ByRowsWeight(Weight):
    """A layer of an MLP in two formats, which round their inputs in the same way."""

    def __init__(self, few: Weight, many: Weight) -> None:
        """few: for up to `MOST_ROWS` rows. many: for more."""
        self._few, self._many = few, many

    @property
    def nbytes(self) -> int:
        return self._few.nbytes + self._many.nbytes

    @property
    def rounding(self) -> Rounding | None:
        return self._few.rounding

    def with_factor(self, factor: float) -> "ByRowsWeight":
        return ByRowsWeight(self._few.with_factor(factor), self._many.with_factor(factor))

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return self._for(x).linear(x, num_ar, out)

    def linear_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._for(x).linear_add_rms_norm(x, residual, norm_weight, eps, num_ar, rounding)

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        return self._for(x).linear_silu_mul(x, num_ar, rounding)

    def _for(self, x: Tensor) -> Weight:
        """The layer that these rows x [rows, in_features] multiply."""
        return self._few if x.shape[0] <= MOST_ROWS else self._many
