"""The arithmetic of a pass: one file per kernel, each with a plain PyTorch reference.

Every function obeys one rule: a row's result depends on that row's inputs only, to the last bit, whatever the number of
rows in the launch and whatever they hold. Zero drift rests on it. Callers keep row counts multiples of `ROW_TILE`.
"""

from kernels.activation import silu_mul
from kernels.attention import AttentionBatch, paged_attention
from kernels.linear import ROW_TILE, PackedLinear, linear, pack_linear
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.sampling import gumbel_noise

__all__ = [
    "ROW_TILE",
    "AttentionBatch",
    "PackedLinear",
    "apply_rope",
    "gumbel_noise",
    "linear",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "silu_mul",
]
