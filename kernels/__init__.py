"""The arithmetic of a pass, in three rooms: `attention`, `linear` with the weight formats, and `rows` for the rest.

Every kernel has a plain PyTorch reference with the same arguments. Triton kernels run on GPUs, and faster versions of some run on
Hopper GPUs.

Every function obeys one rule: a row's result depends on that row's inputs alone, to the last bit, whatever other rows are in the
launch. Zero drift rests on it.
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
