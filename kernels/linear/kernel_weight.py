"""`KernelWeight`: the base class of weights that our own GPU kernels multiply."""

from abc import abstractmethod

import torch
from torch import Tensor

from orthrus.kernels.linear.types import LinearTiles
from orthrus.kernels.linear.weight import Weight
from orthrus.kernels.rounding import Rounding
from orthrus.kernels.workspace import empty


class KernelWeight(Weight):
    """A weight whose kernels write to a given tensor. The argument `tiles` is for tests and measurements."""

    @property
    @abstractmethod
    def outs(self) -> int:
        """Outputs of one view; of a gated layer, gate and up together."""

    @property
    @abstractmethod
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""

    @abstractmethod
    def _run(self, x: Tensor, out: Tensor, num_ar: Tensor | None, tiles: LinearTiles | None) -> None:
        """Compute the layer into out: [rows, outs], or half as many outputs if it is gated."""

    def _result_dtype(self, x: Tensor) -> torch.dtype:
        """The model's dtype. x: the layer's inputs."""
        return x.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor_bytes

    def linear(
        self,
        x: Tensor,
        num_ar: Tensor | None = None,
        out: Tensor | None = None,
        *,
        tiles: LinearTiles | None = None,
    ) -> Tensor:
        if out is None:
            out = empty((x.shape[0], self.outs), self._result_dtype(x), x.device)
        self._run(x, out, num_ar, tiles)
        return out

    def linear_silu_mul(
        self,
        x: Tensor,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
        *,
        tiles: LinearTiles | None = None,
    ) -> Tensor:
        """See `Weight`. Gate and up are not rounded before they are multiplied. The result is stored as it is."""
        out = empty((x.shape[0], self.outs // 2), self._result_dtype(x), x.device)
        self._run(x, out, num_ar, tiles)
        return out
