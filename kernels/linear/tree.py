"""Row-parallel layers, whose inputs are divided among ranks, and the tree in which their sums are added.

The inputs are cut into leaves. Each leaf has a sum of its own, in float32 or wider. Then neighbours are added, and so on up a
binary tree (`add_pairwise`). A rank has the weights of an aligned run of leaves, so its sum is a node of that tree. The ranks'
sums are added in the same way. The number of leaves depends on the model's shape alone. So the number of ranks changes no bit.
These are the layers whose results go into the residual stream.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.weight import Parameters, Views, Weight
from orthrus.kernels.ranks import Ranks, add_pairwise


class TreeWeight(Weight):
    """A layer with a weight for each leaf, in any format. It is the reference of the tree, and what CPUs run."""

    def __init__(
        self, leaves: Sequence[Weight], spans: Sequence[slice], biases: Sequence[Tensor], ranks: Ranks
    ) -> None:
        """leaves: the weight of each leaf, without biases. spans: the inputs of each leaf. biases: for each view [out_features],
        added to the whole sum; empty if there are none."""
        self._leaves, self._spans, self._biases, self._ranks = leaves, spans, biases, ranks

    @staticmethod
    def pack(views: Views, split: Split, pack_leaf: Callable[[Views], Weight]) -> "TreeWeight":
        """Cut a layer of one projection into leaves. views: as `pack_weight` takes them. pack_leaf: packs the views of one leaf.

        Raises ValueError if only one of two views has biases.
        """
        biases = [view[0].pop("bias") for view in views if "bias" in view[0]]
        if biases and len(biases) < len(views):
            raise ValueError("one view of a layer has biases and the other has none: give both or neither")
        weights = [view[0].pop("weight") for view in views]
        assert split.inputs is not None, "its inputs are divided"
        leaves = []
        for span in split.inputs.spans:
            own: list[list[Parameters]] = [[{"weight": weight[:, span].contiguous()}] for weight in weights]
            leaves.append(pack_leaf(own))
        return TreeWeight(leaves, split.inputs.spans, biases, split.ranks)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self._leaves) + sum(bias.nbytes for bias in self._biases)

    def linear(self, x: Tensor, num_ar: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = [
            leaf.linear(x[:, span], num_ar).to(wide)
            for leaf, span in zip(self._leaves, self._spans, strict=True)
        ]
        total = self._ranks.add(add_pairwise(sums))
        if self._biases:
            split = x.shape[0] if len(self._biases) == 1 or num_ar is None else int(num_ar)
            for bias, rows in zip(self._biases, total.tensor_split([split]), strict=False):
                rows.add_(bias)
        return total.to(x.dtype) if out is None else out.copy_(total)
