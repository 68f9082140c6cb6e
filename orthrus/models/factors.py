"""The fixed factors with which drafts in FP8 round the inputs of their linear layers, found from the weights alone.

e4m3 has its full precision from 2**-6 to 448, a range of 2**14.8. So a factor only has to bring the numbers of a tensor into this
range. No calibration with text is needed. Three of the four tensors of a layer have a bound, which the factor brings below 448:

- A row after an RMS norm has n numbers, whose squares have mean 1 before they are multiplied by the norm's weight g. So none is
  larger than sqrt(n) * max |g|.
- A value is v = w x + b, where x is such a row. By the inequality of Cauchy and Schwarz, |v| <= sqrt(n) * |w * g| + |b|, where
  |w * g| is the 2-norm of the weights times g. Attention returns means of values.

Usual numbers are about sqrt(n) smaller than these bounds, which is well inside the range. What gate and up give is a product of
two such numbers, and would be about n times smaller than its bound. That is too small. So the factor brings the median of
|gate * g| * |up * g| over all neurons to 1 at most. A number that is more than 448 times as large becomes 448.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.kernels.rounding import LARGEST
from orthrus.models.dense import dequantised

_CHUNK = 4096
"""Outputs of a weight whose sizes are computed at once: float32 copies of more would need much memory."""
_MOST_BITS = 64
"""Factors are between 2**-64 and 2**64, so that a number times its factor is finite."""


@dataclass(frozen=True)
class Factors:
    """The factors of a decoder layer, all powers of two."""

    normed: float
    """Of the inputs of queries, keys and values."""
    attended: float
    """Of what attention returns."""
    mlp_normed: float
    """Of the inputs of gate and up."""
    gated: float
    """Of the inputs of the MLP's last layer."""

    @staticmethod
    def of(tensors: Mapping[str, Tensor], prefix: str, norm: Tensor, views: Sequence[str]) -> "Factors":
        """The factors of a layer of a checkpoint in the usual layout.

        tensors: the layer's, by their names; quantised ones are dequantised. prefix: what the names begin with, without the dot
        behind it. norm: the weight of the norm before the layer. views: the suffixes of all views, since attention of one view
        reads the values of the others.
        """
        values = [f"{prefix}.self_attn.v_proj{view}" for view in views]
        gate, up, mlp = (
            f"{prefix}.{name}" for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm")
        )
        needed = {*values, gate, up, mlp}
        found = dequantised(
            {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in needed},
            norm.dtype,
        )
        bound = 0.0
        for value in values:
            largest = math.sqrt(norm.shape[0]) * _sizes(found[f"{value}.weight"], norm).max()
            if (bias := found.get(f"{value}.bias")) is not None:
                largest += bias.abs().max()
            bound = max(bound, float(largest))
        mlp_norm = found[f"{mlp}.weight"]
        gated = _sizes(found[f"{gate}.weight"], mlp_norm) * _sizes(found[f"{up}.weight"], mlp_norm)
        used = gated[gated > 0]
        median = float(used.median()) if len(used) else 0.0
        return Factors(
            norm_factor(norm), _factor(bound, LARGEST), norm_factor(mlp_norm), _factor(median, 1.0)
        )


def _sizes(weight: Tensor, norm: Tensor) -> Tensor:
    """The 2-norm of each output's weights [outs, ins] times those of the norm before [ins]: float32 [outs]."""
    return torch.cat([(part.float() * norm.float()).norm(dim=1) for part in weight.split(_CHUNK)])


def norm_factor(norm: Tensor) -> float:
    """The factor of rows after an RMS norm with these weights [width]."""
    return _factor(math.sqrt(norm.shape[0]) * float(norm.abs().max()), LARGEST)


def _factor(size: float, wanted: float) -> float:
    """The largest power of two that brings `size` to `wanted` at most, within limits; 1 for a size that has no such factor."""
    if not 0 < size < math.inf:
        return 1.0
    return 2.0 ** min(_MOST_BITS, max(-_MOST_BITS, math.floor(math.log2(wanted / size))))
