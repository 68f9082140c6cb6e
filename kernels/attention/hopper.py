"""Paged attention on Hopper (compute capability 9.0), whose copy engine fills shared memory by itself.

A multiprocessor's program has two consumers of 64 queries each, and two producers. A consumer, a producer and every other place
of a ring in shared memory make a *lane*. A place holds the keys or the values of a step. The rows of a shared item go to both
consumers, which read the same places, so that keys and values cross the L2 cache once for 128 queries: one producer brings
the keys, the other the values. Afterwards each lane goes through items of its own. What a row goes through, and in which
order, is the same either way.

A diffusion block's own keys are further tiles. All that is read is finite, see `qk_norm_rope`, so hidden keys take part as
0 x something.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from orthrus.kernels.attention.hopper_consume import consume
from orthrus.kernels.attention.hopper_produce import produce
from orthrus.kernels.attention.types import AttentionPlan
from orthrus.kernels.device import chaining

_SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor."""
_OTHER_BYTES = 2048
"""Of it for barriers and what the warps hand each other."""
_PIECE = 16
"""Keys that are fetched at once where cached keys end."""


@gluon.jit
def _attention_kernel(
    qkv,
    k_pages,
    v_pages,
    k_pieces,
    v_pieces,
    rows_desc,
    work,
    out,
    accs,
    tops,
    norms,
    slots,
    scale,
    spare,
    PER_KV: gl.constexpr,
    KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    PLACES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    TRIMS_END: gl.constexpr,
    CHAINED: gl.constexpr,
):
    query_tiles = gl.allocate_shared_memory(k_pages.dtype, [2, QUERIES, WIDTH], QUERY_TILE)
    ring = gl.allocate_shared_memory(k_pages.dtype, [2 * PLACES, KEYS, WIDTH], k_pages.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass: no kernel writes it.
    gl.warp_specialize(
        [
            (consume, (
                qkv, work, out, accs, tops, norms, scale, spare, query_tiles.index(0), ring, full, empty,
                0, PER_KV, KV_HEADS, DIM, PROGRAMS, CHAINED,
            )),
            (consume, (
                qkv, work, out, accs, tops, norms, scale, spare, query_tiles.index(1), ring, full, empty,
                1, PER_KV, KV_HEADS, DIM, PROGRAMS, CHAINED,
            )),
            (produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, slots, ring, full, empty,
                0, KV_HEADS, PER_KV, PAGE, DIM, PROGRAMS, TRIMS_END, CHAINED,
            )),
            (produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, slots, ring, full, empty,
                1, KV_HEADS, PER_KV, PAGE, DIM, PROGRAMS, TRIMS_END, CHAINED,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def launch(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    out: Tensor,
    records: tuple[Tensor, Tensor, Tensor],
    *,
    spare: int,
    queries: int,
    keys: int,
    width: int,
    programs: int,
) -> None:
    """As `triton.launch`; programs: one multiprocessor each."""
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
    all_heads = qkv.shape[1]
    dtype = gl.bfloat16 if qkv.dtype == torch.bfloat16 else gl.float16
    room = _SHARED_BYTES - _OTHER_BYTES - 2 * queries * width * 2

    def tiles(tensor: Tensor, columns: int, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [columns, 1], block, layout)

    tile, piece = [keys, width], [_PIECE, min(width, 64)]

    _attention_kernel[(programs,)](
        qkv,
        tiles(k_cache, dim, tile),
        tiles(v_cache, dim, tile),
        tiles(k_cache, dim, piece),
        tiles(v_cache, dim, piece),
        tiles(qkv, all_heads * dim, tile),
        work.numbers,
        out,
        *records,
        pages * page_size,
        scale,
        spare,
        PER_KV=plan.heads_per_kv,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        # The same number for each lane, two tiles each.
        PLACES=2 * min(8, room // (2 * 2 * keys * width * 2)),
        PROGRAMS=programs,
        QUERY_TILE=gl.NVMMASharedLayout.get_default_for([queries, width], dtype),
        # Where sequences are many and no row is divided, what is not there costs bandwidth. A divided row is read by many
        # programs at once, whose time is that of its last step: more instructions there take longer than the bytes.
        TRIMS_END=work.capacity == 0,
        num_warps=4,
        **chaining(),
    )
