"""The format "lossless12": bfloat16 weights in 12 bits, every bit of them (see `lossless`), where a GPU multiplies them."""

import logging

import torch

from orthrus.kernels.device import runs_triton
from orthrus.kernels.linear.lossless import NotPacked, pack_lossless
from orthrus.kernels.linear.plain import PlainFormat, interleave, stack_views
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Views, Weight, weight_format

logger = logging.getLogger(__name__)


@weight_format("lossless12")
class LosslessFormat:
    """Packs a layer where it can be packed. One that can't be stays in full, which changes no bit of a result.

    A CPU gains nothing from it: the weights are those of the format "plain" there.
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


def _on_gpu(views: Views) -> bool:
    """Whether the kernels can run these weights; those that a checkpoint stores in few bits have kernels of their own."""
    weights = [parameters.get("weight") for view in views for parameters in view]
    return all(w is not None and w.dtype == torch.bfloat16 and runs_triton(w) for w in weights)


def _pack_for_gpu(views: Views, gated: bool, head: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.gpu import TritonWeight
    from orthrus.kernels.linear.lossless_gpu import LosslessWeight

    layer = interleave(views[0]) if gated else stack_views(views)
    try:
        packed = pack_lossless(layer)
    except NotPacked as error:
        shape = list(layer.weights[0].shape)
        logger.warning("a weight of %s stays in bfloat16, since 12 bits can't keep it: %s", shape, error)
        return TritonWeight(layer.weights, layer.bias, layer.interleaved, split=split)
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
