"""The stored format "gptq" of checkpoints: integers of 4 or 8 bits, packed along the inputs (GPTQ; Frantar et al., 2022).

`qweight` int32 [ins * bits / 32, outs], `qzeros` int32 [groups, outs * bits / 32] with each zero point less 1, `scales`
[groups, outs], and `g_idx` int32 [ins], the group of each input. With `desc_act` the groups are not runs of neighbours.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from orthrus.kernels.linear.integer_layers import pack_integers
from orthrus.kernels.linear.integers import WORD, Integers, pack, round_to_integers, unpack
from orthrus.kernels.linear.stored import stored_format
from orthrus.kernels.linear.weight import Views, Weight


@stored_format
class GptqFormat:
    """Weights as a checkpoint with `quant_method: gptq` stores them."""

    stored_as: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @staticmethod
    def pack(views: Views, *, gated: bool, head: bool) -> Weight:
        """See `WeightFormat`."""
        return pack_integers(views, read_gptq, gated=gated, head=head)

    @staticmethod
    def dequantise(parameters: Mapping[str, Tensor]) -> Tensor:
        """See `StoredFormat`."""
        return read_gptq(parameters).dequantised()


def read_gptq(parameters: Mapping[str, Tensor]) -> Integers:
    """The weight of a projection. The number of bits follows from the shapes."""
    group_of = parameters["g_idx"].to(torch.int64)
    bits = WORD * parameters["qweight"].shape[0] // group_of.shape[0]
    return Integers(
        bits,
        unpack(parameters["qweight"].T, bits),
        unpack(parameters["qzeros"], bits).to(torch.int16) + 1,
        parameters["scales"],
        group_of,
    )


def quantise_gptq(weight: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """weight [outs, ins] rounded to the nearest integers, symmetric around zero, as GPTQ stores them.

    No calibration data is used: this is the format of GPTQ without its search. With 8 bits the difference is small.
    """
    rounded = round_to_integers(weight, bits, group_size)
    return {
        "qweight": pack(rounded.numbers, bits).T.contiguous(),
        "qzeros": pack(rounded.zeros - 1, bits),
        "scales": rounded.scales,
        "g_idx": rounded.group_of.to(torch.int32),
    }
