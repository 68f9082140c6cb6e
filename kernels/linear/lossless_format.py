"""The formats "lossless12", bfloat16 weights in 12 bits on a GPU (see `lossless`), and "lossless8", the first 8 of these bits."""

import logging
from contextlib import suppress

import torch
from torch import Tensor

from orthrus.kernels.device import has_fp8_mma, runs_triton
from orthrus.kernels.linear.fp8 import UNSCALED
from orthrus.kernels.linear.lossless import NotPacked, first_plane, pack_lossless
from orthrus.kernels.linear.lossless_stored import is_stored, join_stored
from orthrus.kernels.linear.plain import PlainFormat, interleave, stack_views
from orthrus.kernels.linear.rounded import pack_rounded
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.stored import dense
from orthrus.kernels.linear.types import DenseLayer, LosslessLayer
from orthrus.kernels.linear.weight import Parameters, Views, Weight, weight_format

logger = logging.getLogger(__name__)


@weight_format("lossless12")
class LosslessFormat:
    """Packs a layer if it can be packed. Otherwise the layer stays in bfloat16, which changes no bit of a result.

    On a CPU, packing would gain nothing, so the format is "plain". Weights that a checkpoint stores in 12 bits are concatenated
    to layers, and not packed again.
    """

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        if _on_gpu(views):
            return _pack_for_gpu(views, gated, head, None)
        return PlainFormat.pack(views, gated=gated, head=head)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Each rank packs the part that it has."""
        if _on_gpu(views):
            return _pack_for_gpu(views, gated, head, split)
        return PlainFormat.pack_split(views, split, gated=gated, head=head)


@weight_format("lossless8")
class PlaneFormat:
    """The first 8 of the 12 bits, and inputs in FP8: rough, for drafts. A layer that can't be packed stays in bfloat16.

    A layer of the format "lossless12" can be read in this format without packing it again: see `Weight.rough`.
    """

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        if _on_gpu(views) and has_fp8_mma():
            return LosslessFormat.pack(views, gated=gated, head=head).rough()
        return pack_rounded(views, _first_plane, UNSCALED, None, gated=gated, head=head)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`."""
        if _on_gpu(views) and has_fp8_mma():
            return LosslessFormat.pack_split(views, split, gated=gated, head=head).rough()
        return pack_rounded(views, _first_plane, UNSCALED, split, gated=gated, head=head)


def _first_plane(weight: Tensor) -> Tensor:
    """weight [outs, ins] rounded to its first plane if it can be packed, else as it is."""
    packed = weight.bfloat16()
    try:
        if not torch.equal(packed.to(weight.dtype), weight):
            raise NotPacked("its numbers are not those of bfloat16")
        return first_plane(pack_lossless(DenseLayer((packed,))))[0].to(weight.dtype)
    except NotPacked as error:
        logger.warning("drafts use a weight of %s in full, since %s", list(weight.shape), error)
        return weight


def _on_gpu(views: Views) -> bool:
    """Whether the kernels can run these weights. Weights that a checkpoint stores in other formats have kernels of their own."""

    def can_run(parameters: Parameters) -> bool:
        if is_stored(parameters):
            return runs_triton(parameters["weight_high"])
        weight = parameters.get("weight")
        return weight is not None and weight.dtype == torch.bfloat16 and runs_triton(weight)

    return all(can_run(parameters) for view in views for parameters in view)


def _pack_for_gpu(views: Views, gated: bool, head: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.gpu import TritonWeight
    from orthrus.kernels.linear.lossless_gpu import LosslessWeight

    packed = _packed(views, gated)
    if isinstance(packed, DenseLayer):
        return TritonWeight(packed.weights, packed.bias, packed.interleaved, split=split)
    return LosslessWeight(
        packed.high,
        packed.low,
        packed.exceptions,
        packed.scales,
        packed.bias,
        packed.interleaved,
        split,
        head,
    )


def _packed(views: Views, gated: bool) -> LosslessLayer | DenseLayer:
    """The layer in 12 bits, or in bfloat16 if it can't be packed. Its tensors are removed from `views`."""
    if all(is_stored(parameters) for view in views for parameters in view):
        with suppress(NotPacked):
            joined = join_stored(views, gated)
            for view in views:
                for parameters in view:
                    parameters.clear()
            return joined
    full = [[_in_full(parameters) for parameters in view] for view in views]
    layer = interleave(full[0]) if gated else stack_views(full)
    try:
        return pack_lossless(layer)
    except NotPacked as error:
        shape = list(layer.weights[0].shape)
        logger.warning("a weight of %s stays in bfloat16, since 12 bits can't keep it: %s", shape, error)
    return layer


def _in_full(parameters: Parameters) -> Parameters:
    """Remove the tensors of a projection, and return them with the weight in bfloat16."""
    found = dense(parameters)
    return found | {"weight": found["weight"].bfloat16()}
