"""`Weight`: the interface of a linear layer's weight, which is the same for all formats.

A format is one class in one file. It packs a checkpoint's tensors, knows how many bytes a pass reads of them, keeps its scales
if it has any, and runs the layer. `weight_format` registers it under a name, and `pack_weight` finds it by that name.

Every format must be batch-invariant: a row's result has the same bits whatever other rows are in the pass. Only formats for
drafts may break this rule, as `by_rows` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from orthrus.kernels.linear.split import Split
from orthrus.kernels.rounding import Rounding, rounded
from orthrus.kernels.rows.activation import silu_mul
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.kernels.rows.sampling import best_tokens, gumbel_argmax

Parameters = dict[str, Tensor]
"""The tensors of one projection by the last part of their names in a checkpoint: "weight" [out_features, in_features],
"bias" [out_features] if it has one, and what else a checkpoint's format stores, such as scales."""

Views = Sequence[Sequence[Parameters]]
"""For each view (AR, diffusion): the projections that are concatenated to one layer, for example q, k and v."""


ROUGH_FORMATS = {"lossless12": "lossless8"}
"""For each format whose memory another format can read at lower precision (see `Weight.rough`): the name of that format."""


FIXED_FORMATS = ("fp8", "fp8+int4", "int4", "lossless8")
"""The formats whose inputs are rounded with a fixed factor: see `Weight.with_factor`."""


OUTSIDE_MLP = {"fp8+int4": "fp8", "int4": "fp8"}
"""For each format that only the layers of an MLP have: the format of the model's other layers."""


class Weight(ABC):
    """The weight of a linear layer, one for each of its views, and the layer's bias.

    A format must define `nbytes` and `linear`. It may override the other operations with fused kernels.

    The inputs of every operation may be stored as the property `rounding` says. Where an operation has an argument `rounding`, it
    is that of the layer that takes the result. The result may then be stored so, or as it is.
    """

    @property
    def rounding(self) -> Rounding | None:
        """How the kernel before may store the layer's inputs. None: as they are."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all that the format keeps of the layer: what a pass over every view reads."""

    @abstractmethod
    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [rows, in_features] times the weight, plus the bias: [rows, out_features] in the model's dtype.

        num_ar: int32 [1], required by every operation if the layer has two views, and ignored if it has one. The first num_ar
        rows use the AR view's weight, the others the diffusion view's. out: a tensor for the result, of any floating dtype.
        """

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        """silu(gate) * up of a layer that was packed as `gated`: x [rows, in_features] -> [rows, out_features / 2]."""
        return rounded(silu_mul(self.linear(x, num_ar)), rounding)

    def linear_add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        num_ar: Tensor | None = None,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden = residual + linear(x), and hidden's RMS norm: both [rows, out_features].

        The norm may be stored as `rounding` says.
        """
        hidden = residual + self.linear(x, num_ar)
        return hidden, rounded(rms_norm(hidden, norm_weight, eps), rounding)

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
        """Pick a token for every row from the layer's outputs, as `gumbel_argmax` does from logits.

        logits: float32 or wider [rows, out_features]. It holds the outputs afterwards if `wanted` (int32 [1]) is not 0. Otherwise
        its contents are undefined, because writing them takes a GPU longer than picking from them.
        further: int32 [rows, ranks]. The tokens with the next best scores are written to it, the best first, and `NO_TOKEN` where
        there is none. A GPU considers only the best token of each block of the vocabulary, so it may miss a next best one.
        """
        self.linear(x, num_ar, logits)
        gumbel_argmax(logits, temperatures, keys, picks, first_pick)
        if further is not None:
            further.copy_(best_tokens(logits, temperatures, keys, 1 + further.shape[1])[:, 1:])

    def rough(self) -> "Weight":
        """The weight for draft passes, whose results may be rough. If the format allows it, less of the same memory is read."""
        return self

    def with_factor(self, factor: float) -> "Weight":
        """The same weight, whose inputs are rounded with this factor if the format has a fixed one: see `Rounding`."""
        return self


class OneViewWeight(Weight):
    """A format that runs one view at a time. A layer of two views is then two of these, see `SplitViews`.

    For a layer of two views, the host must know the number of AR rows. So such a layer can't run in a captured CUDA graph.
    """

    bias: Tensor | None
    """[out_features], or None."""

    @classmethod
    @abstractmethod
    def pack_view(cls, projections: Sequence[Parameters]) -> Self:
        """Lay out the weight of one view. The tensors are removed from `projections`."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x [rows, in_features] times the weight: [rows, out_features], without the bias."""

    @classmethod
    def pack(cls, views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        return SplitViews.join([cls.pack_view(view) for view in views])

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        result = self.product(x)
        if self.bias is not None:
            result.add_(self.bias)
        return result if out is None else out.copy_(result)


class SplitViews(Weight):
    """A layer of two views as two weights, which may differ in their formats."""

    def __init__(self, ar: Weight, diffusion: Weight) -> None:
        self._views = ar, diffusion

    @staticmethod
    def join(views: Sequence[Weight]) -> Weight:
        """One weight for these one or two views."""
        return views[0] if len(views) == 1 else SplitViews(*views)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._views)

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        result = apply_views([weight.linear for weight in self._views], x, num_ar)
        return result if out is None else out.copy_(result)

    def linear_silu_mul(
        self, x: Tensor, num_ar: Tensor | None = None, rounding: Rounding | None = None
    ) -> Tensor:
        return rounded(apply_views([weight.linear_silu_mul for weight in self._views], x, num_ar), rounding)


def apply_views(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor, num_ar: Tensor | None) -> Tensor:
    """Apply each view's product to its rows of x. The results are in the order of the rows. num_ar: see `Weight.linear`."""
    if len(products) == 1:
        return products[0](x)
    if num_ar is None:
        raise ValueError("a layer of two views needs num_ar, the number of AR rows")
    ar, diffusion = products
    split = int(num_ar)
    if split == 0:
        return diffusion(x)
    if split == x.shape[0]:
        return ar(x)
    return torch.cat([ar(x[:split]), diffusion(x[split:])])


def join_projections(projections: Sequence[Parameters]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights and the biases of `projections` along the outputs. The tensors are removed from `projections`.

    Raises ValueError if only some of them have a bias.
    """
    weights = [parameters.pop("weight") for parameters in projections]
    biases = [parameters.pop("bias") for parameters in projections if "bias" in parameters]
    if biases and len(biases) < len(weights):
        raise ValueError(
            f"{len(biases)} of {len(weights)} projections of a layer have a bias: give all of them one, or none"
        )
    if len(weights) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None


class WeightFormat(Protocol):
    """What is registered under a format's name: usually a subclass of `Weight`."""

    def pack(self, views: Views, *, gated: bool, head: bool) -> Weight:
        """Lay out the weights of a layer; for the arguments see `pack_weight`."""


@runtime_checkable
class SplitFormat(Protocol):
    """A `WeightFormat` whose layers can be divided among ranks."""

    def pack_split(self, views: Views, split: Split, *, gated: bool, head: bool) -> Weight:
        """Lay out one rank's part of the weights of a layer; for the arguments see `pack_weight`."""


_FORMATS: dict[str, WeightFormat] = {}
_Format = TypeVar("_Format", bound=WeightFormat)


def weight_format(name: str) -> Callable[[_Format], _Format]:
    """Decorator of a class: `pack_weight` finds it under `name` from now on."""

    def register(format: _Format) -> _Format:
        _FORMATS[name] = format
        return format

    return register


def pack_weight(
    views: Views,
    format: str = "plain",
    *,
    gated: bool = False,
    head: bool = False,
    split: Split | None = None,
) -> Weight:
    """Lay out the weights of a layer in a format.

    views: the tensors are removed from these dictionaries, so that only a part of a layer is in memory twice.
    format: a name that `weight_format` registered; ValueError for any other, and for tensors that the format does not use.
    gated: whether the layer's two projections are a gate and up, for `linear_silu_mul`.
    head: whether the layer is the LM head. No norm follows it, so rounding matters more.
    split: which part of the layer `views` hold. If it is None or the format can't be divided, they hold the whole layer, and its
    sums have no tree.
    Raises ValueError if there are several ranks and the format can't be divided.
    """
    if format not in _FORMATS:
        raise ValueError(f"there is no weight format {format!r}; choose one of {', '.join(sorted(_FORMATS))}")
    packer = _FORMATS[format]
    if split is not None and isinstance(packer, SplitFormat):
        weight = packer.pack_split(views, split, gated=gated, head=head)
    elif split is not None and split.ranks.size > 1:
        raise ValueError(
            f"weights in the format {format!r} can't be divided among several GPUs: set tensor_parallel_size to 1"
        )
    else:
        weight = packer.pack(views, gated=gated, head=head)
    unused = sorted({key for view in views for parameters in view for key in parameters})
    if unused:
        raise ValueError(
            f"the weight format {format!r} does not use {', '.join(unused)}: choose a format that does"
        )
    return weight
