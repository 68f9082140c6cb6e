"""Cases of the kernel that norms and rotates queries and keys (kernels/rows/qk_norm_rope_triton.py)."""

import torch

from orthrus.kernels.rows import qk_norm_rope_triton
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.types import KVWrites
from tests.ptx.launches import emulating
from tests.ptx.machine import Way
from tests.ptx.tensors import check, int32, randn


def check_qk_norm_rope(way: Way, views: int, num_ar: int, dim: int) -> None:
    """Five rows, of which the second writes to three slots."""
    rows, heads, kv_heads = 5, 8, 2
    qkv = randn(rows, heads + 2 * kv_heads, dim)
    weight = randn(views, heads + kv_heads, dim, seed=1) if views else None
    cos, sin = randn(rows, 1, dim // 2, seed=2), randn(rows, 1, dim // 2, seed=3)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    writes = KVWrites(int32(7, 0, 33, 5, 6), int32(0, 2, 2, 2, 2), int32(8, 39))
    caches = [torch.zeros(kv_heads, 40, dim, dtype=torch.bfloat16) for _ in range(2)]
    exact, wide = [cache.double() for cache in caches], qkv.double()
    split = int32(num_ar)
    # The numbers that are uploaded before the pass may be read early.
    with emulating(qk_norm_rope_triton, way, chained=(qkv, cos, sin, *caches)):
        qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, 1e-6, split, writes, caches[0], caches[1])
    widened = None if weight is None else weight.double()
    qk_norm_rope(wide, widened, cos.double(), sin.double(), 1e-6, split, writes, exact[0], exact[1])
    check(qkv, wide, 6e-3)
    for cache, expected in zip(caches, exact, strict=True):
        check(cache, expected, 6e-3)
