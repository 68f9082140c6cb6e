"""The stored format "awq" of checkpoints: integers of 4 bits, packed along the outputs (AWQ, version gemm; Lin et al., 2023).

`qweight` int32 [ins, outs / 8], `qzeros` int32 [groups, outs / 8], and `scales` [groups, outs]. The groups are runs of inputs.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from orthrus.kernels.linear.integer_layers import pack_integers
from orthrus.kernels.linear.integers import Integers, unpack
from orthrus.kernels.linear.stored import stored_format
from orthrus.kernels.linear.weight import Views, Weight

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs each four bits of an int32 hold, the lowest bits first."""


@stored_format
class AwqFormat:
    """Weights as a checkpoint with `quant_method: awq` stores them."""

    stored_as: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        return pack_integers(views, read_awq, gated=gated, head=head)

    @staticmethod
    def dequantise(parameters: Mapping[str, Tensor]) -> Tensor:
        """See `StoredFormat`."""
        return read_awq(parameters).dequantised()


def read_awq(parameters: Mapping[str, Tensor]) -> Integers:
    """The weight of a projection."""
    numbers, zeros = (_in_order(unpack(parameters[name], BITS)) for name in ("qweight", "qzeros"))
    ins, groups = numbers.shape[0], zeros.shape[0]
    group_of = torch.arange(ins, device=numbers.device) // (ins // groups)
    return Integers(BITS, numbers.T.contiguous(), zeros.to(torch.int16), parameters["scales"], group_of)


def _in_order(unpacked: Tensor) -> Tensor:
    """Numbers [n, outs] as they come out of the integers, in the order of the outputs."""
    places = torch.tensor(ORDER, device=unpacked.device).argsort()
    return unpacked.unflatten(1, (-1, len(ORDER))).index_select(2, places).flatten(1)
