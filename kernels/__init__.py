"""The arithmetic of a pass: one file per kernel. `X.py` is plain PyTorch, `X_triton.py` the same function on a GPU.

Every function obeys one rule: a row's result depends on that row's inputs only, to the last bit, whatever the number of
rows in the launch and whatever they hold. Zero drift rests on it. Callers keep row counts multiples of `ROW_TILE`.
"""

from kernels.activation import silu_mul
from kernels.attention import AttentionBatch, paged_attention
from kernels.linear import ROW_TILE, PackedLinear, linear, pack_linear
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import rms_norm
from kernels.sampling import gumbel_noise

__all__ = [
    "ROW_TILE",
    "AttentionBatch",
    "PackedLinear",
    "gumbel_noise",
    "linear",
    "pack_linear",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "silu_mul",
]
