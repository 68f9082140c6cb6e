"""Linear layers on a GPU: which kernels run, and where their results go."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.linear import hopper, triton
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.linear.fp8_triton import quantise_rows
from orthrus.kernels.linear.tiles import choose_tiles, num_segments
from orthrus.kernels.linear.types import DenseLayer, LinearTiles
from orthrus.kernels.linear.weight import Weight
from orthrus.kernels.rows.sampling_triton import gumbel_argmax, pick_best
from orthrus.kernels.workspace import empty


@dataclass(frozen=True)
class TritonWeight(DenseLayer, Weight):
    """Weights as plain tensors, for the Triton kernels: float16, bfloat16, float32, and FP8 with scales.

    The inputs of FP8 weights are rounded to FP8 first. Every operation raises ValueError if a row of these inputs is not a
    multiple of 16 bytes, which the GPU's copy engine needs. The arguments `tiles` and `segments` are for tests and measurements.
    """

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
            out = empty((x.shape[0], self.weights[0].shape[0]), x.dtype, x.device)
        self._run(x, out, num_ar, tiles)
        return out

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, *, tiles: LinearTiles | None = None
    ) -> Tensor:
        """See `Weight`; gate and up are rounded only after they have met."""
        out = empty((x.shape[0], self.weights[0].shape[0] // 2), x.dtype, x.device)
        self._run(x, out, num_ar, tiles)
        return out

    def linear_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        num_ar: Tensor | None = None,
        *,
        tiles: LinearTiles | None = None,
        segments: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, outs = residual.shape
        segments = segments or num_segments(outs, x.shape[1])
        if tiles is None and not hopper.streams(x):
            tiles = choose_tiles(rows, outs, segments, self.weights[0].dtype)
        parts = segments if tiles is None or tiles.split else 1
        if parts > 1:
            out = empty((parts, rows, outs), torch.float32, x.device)
        else:
            out = empty((rows, outs), x.dtype, x.device)
        self._run(x, out, num_ar, tiles, segments)
        return add_rms_norm(
            out,
            residual,
            norm_weight,
            eps,
            self.bias if parts > 1 else None,
            self._split(num_ar),
            rounded=self.scales is not None,
        )

    def linear_gumbel_argmax(
        self,
        x: Tensor,
        logits: Tensor,
        wanted: Tensor,
        temperatures: Tensor,
        keys: Tensor,
        picks: Tensor,
        first_pick: Tensor,
        num_ar: Tensor | None = None,
    ) -> None:
        """See `Weight`; with few rows, each tile of outputs is picked from before it is stored, if it is stored at all."""
        if not hopper.streams(x):
            self.linear(x, num_ar, logits)
            gumbel_argmax(logits, temperatures, keys, picks, first_pick)
            return
        pick_best(*self.best_of_tiles(x, logits, wanted, temperatures, keys, num_ar), picks, first_pick)

    def best_of_tiles(
        self,
        x: Tensor,
        logits: Tensor,
        wanted: Tensor,
        temperatures: Tensor,
        keys: Tensor,
        num_ar: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`best_of_blocks` of the layer's outputs, for rows that `hopper` takes: see `linear_gumbel_argmax`."""
        x, x_scales = self._inputs(x)
        shape = x.shape[0], hopper.num_tiles(logits.shape[1])
        values = torch.empty(shape, device=x.device, dtype=torch.float32)
        indices = torch.empty(shape, device=x.device, dtype=torch.int32)
        picking = temperatures, keys, wanted, values, indices
        hopper.launch(x, self, logits, self._split(num_ar), 1, picking, x_scales)
        return values, indices

    def _run(
        self, x: Tensor, out: Tensor, num_ar: Tensor | None, tiles: LinearTiles | None, segments: int = 1
    ) -> None:
        """Compute the layer into out: [rows, outs], or [segments, rows, outs] without the bias."""
        stream = tiles is None and hopper.streams(x)
        x, x_scales = self._inputs(x)
        if stream:
            hopper.launch(x, self, out, self._split(num_ar), segments, x_scales=x_scales)
        else:
            triton.launch(x, self, out, self._split(num_ar), segments, tiles, x_scales)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inputs x [rows, in_features] as the kernels take them, and their scales if they are in FP8."""
        x, scales = (x, None) if self.scales is None else quantise_rows(x)
        if x.shape[1] * x.itemsize % 16:
            raise ValueError(
                f"a linear layer with {x.shape[1]} inputs of {x.dtype} can't run on a GPU: "
                "its rows must be multiples of 16 bytes"
            )
        return x, scales

    def _split(self, num_ar: Tensor | None) -> Tensor | None:
        """What the kernels are given: None for a layer of one view, whose kernels never read it."""
        return num_ar if len(self.weights) > 1 else None
