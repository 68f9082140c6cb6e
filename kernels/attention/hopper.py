"""Paged attention on Hopper (compute capability 9.0), warp-specialized: producers load by TMA, consumers multiply.

One program runs on each SM. It has two consumer warpgroups of 64 queries each, and two producer warps that fill a ring buffer in
shared memory. A stage of the ring holds the keys or the values of a step of 128 keys. A consumer, a producer and every other
stage make a *lane*.

The rows of a shared item are divided between both consumers, which read the same stages. One producer then loads the keys and the
other the values, so each is read from the L2 cache once for 128 queries. After the shared items, each lane works through items of
its own. The steps of a row, and their order, are the same either way.

A diffusion block's own keys are further tiles. Values of masked keys are multiplied by a weight of 0. That gives 0, because
everything that is read is finite: see `qk_norm_rope`.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
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
from orthrus.kernels.rounding import Rounding, stored_as

_SHARED_BYTES = 227 * 1024
"""Shared memory of an SM that a program can use."""
_OTHER_BYTES = 2048
"""The part of it that is kept for mbarriers and for data that warps exchange."""
_PIECE = 16
"""Keys of one TMA load in a last step that is not full: see `TRIMS_END`."""


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
    num_slots,
    scale,
    spare,
    factor,
    PER_KV: gl.constexpr,
    KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    TRIMS_END: gl.constexpr,
    IN_WORDS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    query_tiles = gl.allocate_shared_memory(k_pages.dtype, [2, QUERIES, WIDTH], QUERY_TILE)
    ring = gl.allocate_shared_memory(k_pages.dtype, [2 * STAGES, KEYS, WIDTH], k_pages.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if CHAINED:
        gdc_launch_dependents()
    # The work list is uploaded before the pass, so it may be read before `gdc_wait`.
    gl.warp_specialize(
        [
            (consume, (
                qkv, work, out, accs, tops, norms, scale, spare, factor, query_tiles.index(0), ring, full, empty,
                0, PER_KV, KV_HEADS, DIM, PROGRAMS, IN_WORDS, CHAINED,
            )),
            (consume, (
                qkv, work, out, accs, tops, norms, scale, spare, factor, query_tiles.index(1), ring, full, empty,
                1, PER_KV, KV_HEADS, DIM, PROGRAMS, IN_WORDS, CHAINED,
            )),
            (produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, num_slots, ring, full, empty,
                0, KV_HEADS, PER_KV, PAGE, DIM, PROGRAMS, TRIMS_END, CHAINED,
            )),
            (produce, (
                k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, num_slots, ring, full, empty,
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
    rounding: Rounding | None,
    *,
    spare: int,
    queries: int,
    keys: int,
    width: int,
    programs: int,
) -> None:
    """See `triton.launch`. programs: one per SM."""
    work = plan.work
    assert work is not None
    kv_heads, pages, page_size, dim = k_cache.shape
    all_heads = qkv.shape[1]
    factor, in_words = stored_as(rounding)
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
        factor,
        PER_KV=plan.heads_per_kv,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=dim,
        WIDTH=width,
        QUERIES=queries,
        KEYS=keys,
        # The same number for each lane. A stage has two tiles.
        STAGES=2 * min(8, room // (2 * 2 * keys * width * 2)),
        PROGRAMS=programs,
        QUERY_TILE=gl.NVMMASharedLayout.get_default_for([queries, width], dtype),
        # Whether to load only the existing keys of a last step. With many sequences no row is divided, and the missing keys would
        # cost bandwidth. The programs of a divided row take as long as its last step: there the instructions would cost more.
        TRIMS_END=work.capacity == 0,
        IN_WORDS=in_words,
        num_warps=4,
        **chaining(),
    )
