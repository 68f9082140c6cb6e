"""Linear layers, and the formats that their weights are kept in.

`Weight` is the interface of a format. `pack_weight` packs a layer in the format with a given name. A format is registered when
its file is imported, so this package imports them all. Formats of quantised checkpoints are found by their tensors: see `stored`.
"""

from orthrus.kernels.linear import (  # noqa: F401
    awq,
    by_rows,
    fp8,
    fp8_block,
    gptq,
    int4,
    lossless_format,
    lossless_stored,
    plain,
)
from orthrus.kernels.linear.split import Split
from orthrus.kernels.linear.stored import dense
from orthrus.kernels.linear.weight import (
    FIXED_FORMATS,
    OUTSIDE_MLP,
    ROUGH_FORMATS,
    OneViewWeight,
    Parameters,
    SplitViews,
    Weight,
    join_projections,
    pack_weight,
    weight_format,
)

__all__ = [
    "FIXED_FORMATS",
    "OUTSIDE_MLP",
    "ROUGH_FORMATS",
    "OneViewWeight",
    "Parameters",
    "Split",
    "SplitViews",
    "Weight",
    "dense",
    "join_projections",
    "pack_weight",
    "weight_format",
]
