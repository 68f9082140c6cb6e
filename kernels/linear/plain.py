"""The format "plain": the weights of the checkpoint without rounding, in the layout that the device multiplies fastest."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.linear.half import HalfWeight, as_halves
from orthrus.kernels.linear.onednn import OneDnnWeight
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.stored import StoredFormat, stored_format_of
from orthrus.kernels.linear.tree import TreeWeight
from orthrus.kernels.linear.types import GATE_BLOCK, DenseLayer
from orthrus.kernels.linear.weight import (
    Parameters,
    SplitViews,
    Views,
    Weight,
    join_projections,
    weight_format,
)
from orthrus.kernels.ranks import ONE_RANK, Ranks


@weight_format("plain")
class PlainFormat:
    """Chooses a layout by the device and the dtype of the tensors. None of them rounds a weight."""

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`. Weights that a checkpoint stores quantised stay so, each view in its own format."""
        stored = [_stored_format(view) for view in views]
        if any(stored):
            return SplitViews.join(
                [
                    (own or PlainFormat).pack([view], gated=gated, head=head)
                    for own, view in zip(stored, views, strict=True)
                ]
            )
        return _pack(views, gated, head, ONE_RANK)

    @staticmethod
    def pack_split(views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """See `SplitFormat`. Raises ValueError for weights that a checkpoint stores quantised, if there are several ranks."""
        if any(_stored_format(view) for view in views):
            if split.ranks.size > 1:
                raise ValueError(
                    "quantised weights can't be divided among GPUs: set tensor_parallel_size to 1"
                )
            return PlainFormat.pack(views, gated=gated, head=head)
        if runs_triton(views[0][0]["weight"]):
            return _pack_for_gpu(views, gated, split)
        if split.has_tree:
            return TreeWeight.pack(views, split, partial(_pack, gated=gated, head=head, ranks=ONE_RANK))
        return _pack(views, gated, head, split.ranks)


def _pack(views: Views, gated: bool, head: bool, ranks: Ranks) -> Weight:
    """ranks: those that have parts of the layer, and so must choose the same layout."""
    first = views[0][0]["weight"]
    if runs_triton(first):
        return _pack_for_gpu(views, gated, None)
    on_cpu = first.device.type == "cpu"
    if on_cpu and first.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return SplitViews.join([_for_cpu(*join_projections(view), head, ranks) for view in views])
    layer = stack_views(views)
    return DenseWeight(layer.weights, layer.bias)


def _pack_for_gpu(views: Views, gated: bool, split: Split | None) -> Weight:
    from orthrus.kernels.linear.gpu import TritonWeight

    layer = interleave(views[0]) if gated else stack_views(views)
    return TritonWeight(layer.weights, layer.bias, layer.interleaved, split=split)


def _stored_format(view: Sequence[Parameters]) -> StoredFormat | None:
    """The format in which a checkpoint stores all projections of a view; None if they are not quantised.

    Raises ValueError if their formats differ, since they are one layer.
    """
    formats = {stored_format_of(parameters) for parameters in view}
    if len(formats) > 1:
        raise ValueError(
            "the projections of a layer are stored in different formats: quantise all of q, k and v or none of them, and both "
            "of gate and up or none"
        )
    return formats.pop()


def _for_cpu(weight: Tensor, bias: Tensor | None, head: bool, ranks: Ranks) -> Weight:
    """A float32 weight as float16 if no rank loses a bit by that, since it takes half as long to read."""
    halves = as_halves(weight)
    if not ranks.all_agree(halves is not None) or halves is None:
        return OneDnnWeight(weight, bias)
    return HalfWeight(*halves, bias, head=head)


def stack_views(views: Views) -> DenseLayer:
    """The views' weights, contiguous in memory. Raises ValueError if only one of two views has biases."""
    weights, bias = join_views(views)
    if len(weights) == 1:
        return DenseLayer((weights[0].contiguous(),), bias)
    return DenseLayer(torch.stack(weights).unbind(), bias)


def join_views(views: Views) -> tuple[list[Tensor], Tensor | None]:
    """Each view's weight, and their biases as one tensor [views, out_features] if they have any.

    Raises ValueError if only one of two views has biases.
    """
    joined = [join_projections(view) for view in views]
    biases = [bias for _, bias in joined if bias is not None]
    if biases and len(biases) < len(joined):
        raise ValueError("one view of a layer has biases and the other has none: give both or neither")
    return [weight for weight, _ in joined], torch.stack(biases) if biases else None


def interleave(projections: Sequence[Parameters]) -> DenseLayer:
    """Fuse gate and up, each [width, in_features], into one layer [2 * width, in_features].

    Its outputs and biases alternate in blocks of `GATE_BLOCK`, so that an output of the gate and that of up are in one tile.
    """
    weight, bias = join_projections(projections)
    return DenseLayer((alternate(weight),), None if bias is None else alternate(bias)[None], interleaved=True)


def alternate(joined: Tensor) -> Tensor:
    """Reorder the first dimension, which is all of the gate and then all of up, to blocks of `GATE_BLOCK` of each in turn."""
    return joined.unflatten(0, (2, -1, GATE_BLOCK)).transpose(0, 1).flatten(0, 2)
