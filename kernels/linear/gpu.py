"""Linear layers on a GPU: which kernels run, and where their results go."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.linear import hopper, triton
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.linear.kernel_weight import KernelWeight
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.tiles import MOST_PARTS, choose_tiles, leaf_unit, num_parts
from orthrus.kernels.linear.types import DenseLayer, LinearTiles
from orthrus.kernels.ranks import Ranks, add_pairwise, collective
from orthrus.kernels.ranks.peer_memory import PeerMemory
from orthrus.kernels.ranks.peer_triton import pick_best_of_ranks, send_logits
from orthrus.kernels.rounding import Rounding, is_fixed
from orthrus.kernels.rounding_triton import rounded
from orthrus.kernels.rows.sampling_triton import (
    FURTHER_COLUMNS,
    PICK_COLUMNS,
    best_of_blocks,
    pick_best,
)
from orthrus.kernels.workspace import empty


class GpuWeight(KernelWeight):
    """The base class of weights whose kernels support several views, and leaves that are divided among ranks.

    Every operation raises ValueError if a row of the inputs is not a multiple of 16 bytes, as TMA requires. The arguments `tiles`
    and `leaves` are for tests and measurements.
    """

    bias: Tensor | None
    """[views, outs], or None."""
    scales: Tensor | None
    """[views, outs]: what the sums of an output are multiplied by. None for weights without scales."""
    split: Split | None
    """Which part of a layer this is. None for a whole layer whose sum does not use the model's leaves."""

    @property
    @abstractmethod
    def views(self) -> int:
        """1 or 2."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that the tensor cores multiply."""

    @property
    def _peers(self) -> PeerMemory | None:
        """The GPU memory that the ranks share, if there are several and they can."""
        return None if self.split is None else self.split.ranks.peers

    @property
    def _collective(self) -> Ranks | None:
        """The ranks, if there are several and their GPUs can't reach each other's memory."""
        return self.split.ranks if self.split is not None and self.split.ranks.collective else None

    @abstractmethod
    def _streams(self, x: Tensor) -> bool:
        """Whether `_stream` takes these rows x [rows, in_features]."""

    @abstractmethod
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
        """Run the layer in the kernel for few rows; for the arguments see `hopper.launch`.

        rounding: only for a `FixedInputsWeight`.
        """

    @abstractmethod
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
        """Run the layer in the kernel for any rows; for the arguments see `triton.launch`. tiles: None for the usual ones.

        rounding: only for a `FixedInputsWeight`.
        """

    def _choose_tiles(self, rows: int, leaves: int) -> LinearTiles:
        """The usual tiles of a layer whose sum has this number of leaves."""
        return choose_tiles(rows, self.outs, leaves, self.dtype)

    def _num_parts(self, rows: int, outs: int, ins: int) -> int:
        """Split-K parts of the layer, if its result goes into the residual stream. Only those of drafts may depend on `rows`."""
        return num_parts(outs, ins)

    def linear_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
        *,
        tiles: LinearTiles | None = None,
        leaves: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Weight`. leaves: number of leaves of the inputs, if the model does not give them."""
        rows, outs = residual.shape
        inputs = self._leaves(rows, outs, x.shape[1], leaves)
        if tiles is None and not self._streams(x):
            tiles = self._choose_tiles(rows, inputs.total)
        parts = 1
        if tiles is None:
            parts = min(inputs.count, self._num_parts(rows, outs, x.shape[1]))
        elif tiles.split:
            parts = min(inputs.count, MOST_PARTS)
        peers = self._peers
        ranks = self._collective
        if parts > 1 or peers is not None or ranks is not None:
            out = empty((parts, rows, outs), torch.float32, x.device)
        else:
            out = empty((rows, outs), residual.dtype, x.device)
        self._run(x, out, num_ar, tiles, parts, inputs)
        if ranks is not None:
            out = ranks.add(add_pairwise(out.unbind()))[None]
        return add_rms_norm(
            out,
            residual,
            norm_weight,
            eps,
            self.bias if out.dim() == 3 else None,
            self._kernel_num_ar(num_ar),
            rounding=rounding,
            peers=peers,
        )

    def _leaves(self, rows: int, outs: int, ins: int, count: int | None) -> Leaves:
        """The leaves of the inputs: those of the model, divided further if one row would leave the GPU idle.

        FP8 layers, which only drafts use, have leaves of their own. count: their number, or that of a layer without the model's
        leaves; None for the usual one. Raises ValueError for leaves that the kernels can't take.
        """
        unit, split = leaf_unit(self.dtype), self.split
        if split is None or split.inputs is None or self.dtype == torch.float8_e4m3fn:
            return Leaves.whole(ins, unit, count or self._num_parts(rows, outs, ins))
        inputs = split.inputs
        if inputs.total > 1 and inputs.unit != unit:
            raise ValueError(
                f"a sum of {inputs.width} inputs can't have {inputs.total} leaves on a GPU, where they must be multiples of "
                f"{unit} inputs: set sum_leaves and tensor_parallel_size to 1"
            )
        finer = max(1, num_parts(outs, inputs.width) // inputs.total)
        return Leaves(inputs.width, unit, inputs.total * finer, inputs.first * finer, inputs.count * finer)

    @property
    def _first_token(self) -> int:
        """The token of an LM head's first output."""
        return 0 if self.split is None else self.split.first_output

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
        further: Tensor | None = None,
    ) -> None:
        """See `Weight`. With few rows, the kernel's epilogue picks from each tile of outputs, and stores it only if `wanted`."""
        if self._streams(x):
            best = self.best_of_tiles(x, logits, wanted, temperatures, keys, num_ar)
        else:
            self.linear(x, num_ar, logits)
            columns = PICK_COLUMNS if further is None else FURTHER_COLUMNS
            best = best_of_blocks(logits, temperatures, keys, columns, self._first_token)
        if self._collective is not None:
            # Logits that are wanted are gathered by the runner.
            collective.pick_best_of_ranks(self._collective, *best, picks, first_pick)
        elif self._peers is None:
            pick_best(*best, picks, first_pick, further)
        else:
            send_logits(self._peers, logits, wanted, self._first_token)
            pick_best_of_ranks(self._peers, *best, picks, first_pick)

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
        shape = x.shape[0], hopper.num_tiles(logits.shape[1])
        values = torch.empty(shape, device=x.device, dtype=torch.float32)
        indices = torch.empty(shape, device=x.device, dtype=torch.int32)
        picking = temperatures, keys, wanted, values, indices
        self._stream(x, logits, self._kernel_num_ar(num_ar), 1, picking, None, None)
        return values, indices

    def _run(
        self,
        x: Tensor,
        out: Tensor,
        num_ar: Tensor | None,
        tiles: LinearTiles | None,
        parts: int = 1,
        inputs: Leaves | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """Write the layer's result to out: [rows, outs], or nodes of its tree [parts, rows, outs] without the bias.

        rounding: how `out` stores the result.
        """
        if x.shape[1] * self.dtype.itemsize % 16:
            raise ValueError(
                f"a linear layer with {x.shape[1]} inputs of {self.dtype} can't run on a GPU: "
                "its rows must be multiples of 16 bytes"
            )
        num_ar = self._kernel_num_ar(num_ar)
        if tiles is None and self._streams(x):
            self._stream(x, out, num_ar, parts, (), inputs, rounding)
        else:
            self._tile(x, out, num_ar, parts, tiles, inputs, rounding)

    def _kernel_num_ar(self, num_ar: Tensor | None) -> Tensor | None:
        """The argument num_ar of the kernels: None for a layer of one view, whose kernels never read it."""
        return num_ar if self.views > 1 else None


@dataclass(frozen=True, kw_only=True)
class FixedInputsWeight(GpuWeight):
    """The base class of weights that may take their inputs in FP8, with a fixed factor, and store results so for another layer.

    Inputs that have not been stored in FP8 are rounded first. The weights' scales take the factor into account.
    """

    rounding: Rounding | None = None
    """None for weights that take their inputs as they are."""
    result_dtype: torch.dtype | None = None
    """The model's dtype. None: that of the inputs."""

    def with_factor(self, factor: float) -> Self:
        if self.rounding is None:
            return self
        assert self.scales is not None and self.rounding.factor is not None
        # `scales` is a field of the subclasses.
        fields: dict[str, Any] = {"scales": self.scales * (self.rounding.factor / factor)}
        return replace(self, rounding=replace(self.rounding, factor=factor), **fields)

    def linear_silu_mul(
        self,
        x: Tensor,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
        *,
        tiles: LinearTiles | None = None,
    ) -> Tensor:
        """See `Weight`. Gate and up are not rounded before they are multiplied."""
        if not is_fixed(rounding):
            return super().linear_silu_mul(x, num_ar, tiles=tiles)
        out = empty((x.shape[0], self.outs // 2), torch.float8_e4m3fn, x.device)
        self._run(x, out, num_ar, tiles, rounding=rounding)
        return out

    def _result_dtype(self, x: Tensor) -> torch.dtype:
        return self.result_dtype or x.dtype

    def _inputs(self, x: Tensor) -> Tensor:
        """The inputs x [rows, in_features] as the kernels take them."""
        return x if self.rounding is None else rounded(x, self.rounding)


@dataclass(frozen=True)
class TritonWeight(DenseLayer, FixedInputsWeight):
    """Weights as plain tensors, for the kernels of `triton` and `hopper`: float16, bfloat16, float32, and FP8 with scales.

    FP8 weights have a `rounding` and a `result_dtype`.
    """

    split: Split | None = None

    @property
    def views(self) -> int:
        return len(self.weights)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    def _streams(self, x: Tensor) -> bool:
        return hopper.streams(x)

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
        hopper.launch(self._inputs(x), self, out, num_ar, parts, picking, inputs, rounding, self._first_token)

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
        triton.launch(self._inputs(x), self, out, num_ar, parts, tiles, inputs, rounding)
