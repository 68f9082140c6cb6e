"""The arithmetic of a pass: one file per kernel. `X.py` is plain PyTorch, `X_triton.py` the same function on a GPU, `X_stream.py`
a faster version for Hopper.

Every function obeys one rule: a row's result depends on that row's inputs only, to the last bit, whatever the number of
rows in the launch and whatever they hold. Zero drift rests on it.
"""

from kernels.attention import AttentionGroup, AttentionPlan, paged_attention
from kernels.linear import Parameters, Weight, pack_weight
from kernels.rows.embedding import embed
from kernels.rows.qk_norm_rope import qk_norm_rope
from kernels.rows.sampling import gumbel_argmax, gumbel_noise
from kernels.rows.types import NO_TOKEN
from kernels.rows.upload import upload
from kernels.workspace import start_layer

__all__ = [
    "NO_TOKEN",
    "AttentionGroup",
    "AttentionPlan",
    "Parameters",
    "Weight",
    "embed",
    "gumbel_argmax",
    "gumbel_noise",
    "pack_weight",
    "paged_attention",
    "qk_norm_rope",
    "start_layer",
    "upload",
]
