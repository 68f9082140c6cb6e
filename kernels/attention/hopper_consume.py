"""The consumer warpgroups of the Hopper attention kernel. Each computes the attention of up to 64 queries.

The arithmetic is that of `triton`, in steps of 128 keys.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.attention.hopper_lanes import (
    KVRing,
    PipelineState,
    advance,
    item_index,
    lane_share,
    release,
)
from orthrus.kernels.attention.items import (
    ends_record,
    item_keys,
    load_item,
    next_segment,
    start_walk,
    take_step,
)
from orthrus.kernels.attention.softmax import Records, Softmax
from orthrus.kernels.rounding_triton import stored_place, stored_value


@gluon.jit
def _exp2(x):
    """2 ** x in one instruction. Subnormal results become zero."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pointers(
    base,
    first,
    inside,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
    IN_WORDS: gl.constexpr = False,
):
    """Pointers to the WIDTH numbers from base[first] on of each query, and their mask: both [queries, WIDTH / 8, 8] in `layout`.

    The last dimension is 8, so that the addresses of a thread differ by constants, which are encoded in its instructions.
    IN_WORDS: whether the numbers are in the order of words, see `Rounding`.
    """
    of_query: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    eights = 8 * gl.arange(0, WIDTH // 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    ones = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    mask = gl.convert_layout(inside, of_query)[:, None, None] & (eights < DIM)[None, :, None]
    if IN_WORDS:
        eights, ones = eights // 16 * 16 + 1 - eights % 16 // 8, stored_place(ones, True) - 1
    pointers = (base + gl.convert_layout(first, of_query))[:, None, None] + ones[None, None, :]
    return pointers + eights[None, :, None], mask


@gluon.jit
def _merge(first, second):
    """`softmax.merge` in Gluon."""
    layout: gl.constexpr = second.acc.type.layout
    wide: gl.constexpr = gl.SliceLayout(1, layout)
    top = gl.maximum(first.top, second.top)
    base = gl.where(top == float("-inf"), 0.0, top)
    old, new = gl.exp2(first.top - base), gl.exp2(second.top - base)
    norm = gl.fma(first.norm, old, second.norm * new)
    old, new = gl.convert_layout(old, wide)[:, None], gl.convert_layout(new, wide)[:, None]
    acc = gl.fma(first.acc, gl.zeros_like(first.acc) + old, second.acc * new)
    return Softmax(top, norm, acc)


@gluon.jit
def _load_queries(
    qkv, query_tile, row, rows, kv_head, PER_KV: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr
):
    """Copy one KV head's queries of `rows` rows, from row `row` on, to shared memory. The rest of the tile becomes zero."""
    QUERIES: gl.constexpr = query_tile.shape[0]
    WIDTH: gl.constexpr = query_tile.shape[1]
    LANES: gl.constexpr = min(32, WIDTH // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    query = gl.arange(0, QUERIES, gl.SliceLayout(1, layout))
    dims = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    head = kv_head * PER_KV + query % PER_KV
    source = ((row + query // PER_KV) * ((PER_KV + 2) * KV_HEADS) + head).to(gl.int64) * DIM
    mask = (query // PER_KV < rows)[:, None] & (dims < DIM)[None, :]
    query_tile.store(gl.load(qkv + source[:, None] + dims[None, :], mask=mask, other=0.0))
    fence_async_shared()


@gluon.jit
def _scores(query_tile, ring, pipe, layout: gl.constexpr):
    """Wait for a step's two key tiles, and multiply the queries by each: two float32 [QUERIES, KEYS]."""
    QUERIES: gl.constexpr = query_tile.shape[0]
    KEYS: gl.constexpr = ring.tiles.shape[1]
    none = gl.zeros((QUERIES, KEYS), gl.float32, layout)
    stage = pipe.stage
    mbarrier.wait(ring.full.index(stage), pipe.phase)
    first = warpgroup_mma(
        query_tile, ring.tiles.index(2 * stage).permute((1, 0)), none, use_acc=False, is_async=True
    )
    second = warpgroup_mma(
        query_tile, ring.tiles.index(2 * stage + 1).permute((1, 0)), none, use_acc=False, is_async=True
    )
    return warpgroup_mma_wait(0, deps=(first, second))


@gluon.jit
def _mask(first, second, bound, seen_by_last, seen_by_all):
    """The scores of both tiles, with -inf for keys that a query does not see.

    bound: how many of the step's keys each query sees. seen_by_last: the largest of these. seen_by_all: the smallest.
    This runs once or twice per item, so its instructions are rarely in the instruction cache. It is kept short for that reason.
    """
    KEYS: gl.constexpr = first.shape[1]
    keys = gl.arange(0, KEYS, gl.SliceLayout(0, first.type.layout))
    if seen_by_last > KEYS:
        second = gl.where(keys[None, :] + KEYS < bound[:, None], second, float("-inf"))
    else:
        second = gl.full_like(second, float("-inf"))
    if seen_by_all < KEYS:
        first = gl.where(keys[None, :] < bound[:, None], first, float("-inf"))
    return first, second


@gluon.jit
def _weigh(soft, first, second, scale, operand_dtype: gl.constexpr):
    """Update the online softmax by a step's scores, without its values: acc is only rescaled.

    Also returns the weights of both tiles, in registers as the tensor cores take them.
    """
    wide: gl.constexpr = gl.SliceLayout(1, soft.acc.type.layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, soft.acc.type.layout, 2)
    top = gl.maximum(soft.top, gl.max(gl.maximum(first, second), 1) * scale)
    # The maximum of a row that has seen no key is -inf. Any finite base works for it, since all its weights are zero.
    base = gl.where(top == float("-inf"), 0.0, top)
    shift = gl.zeros_like(first) - base[:, None]
    weights = _exp2(gl.fma(first, gl.zeros_like(first) + scale, shift))
    weights2 = _exp2(gl.fma(second, gl.zeros_like(first) + scale, shift))
    rescale = _exp2(soft.top - base)
    norm = gl.fma(soft.norm, rescale, gl.sum(weights + weights2, 1))
    acc = soft.acc * gl.convert_layout(rescale, wide)[:, None]
    weights = gl.convert_layout(weights.to(operand_dtype), operand)
    weights2 = gl.convert_layout(weights2.to(operand_dtype), operand)
    return Softmax(top, norm, acc), weights, weights2


@gluon.jit
def _add_values(acc, ring, pipe, weights, weights2):
    """Wait for a step's two value tiles, and add their products with the weights to acc."""
    stage = pipe.stage
    mbarrier.wait(ring.full.index(stage), pipe.phase)
    acc = warpgroup_mma(weights, ring.tiles.index(2 * stage), acc, is_async=True)
    acc = warpgroup_mma(weights2, ring.tiles.index(2 * stage + 1), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _load_partial(records, at, acc_at, inside, mask, acc):
    """Load the softmax states that were stored to the records `at`. acc: a tensor with the shape and layout of the result's."""
    partial = gl.load(acc_at, mask=mask, other=0.0).reshape((acc.shape[0], acc.shape[1]))
    return Softmax(
        gl.load(records.tops + at, mask=inside, other=0.0),
        gl.load(records.norms + at, mask=inside, other=0.0),
        gl.convert_layout(partial, acc.type.layout),
    )


@gluon.jit
def consume(
    qkv, work, out, accs, tops, norms, scale, spare, factor, query_tile, tiles, full, empty,
    LANE: gl.constexpr, PER_KV: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PROGRAMS: gl.constexpr,
    IN_WORDS: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Run a lane's consumer: its half of the rows of each shared item, then all rows of its own items."""
    QUERIES: gl.constexpr = query_tile.shape[0]
    STAGES: gl.constexpr = full.shape[0]
    KEYS: gl.constexpr = tiles.shape[1]
    STEP: gl.constexpr = 2 * KEYS
    WIDTH: gl.constexpr = tiles.shape[2]
    ROWS: gl.constexpr = QUERIES // PER_KV
    HEADS: gl.constexpr = KV_HEADS * PER_KV
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    by_query: gl.constexpr = gl.SliceLayout(1, scores_layout)
    wide: gl.constexpr = gl.SliceLayout(1, acc_layout)

    query = gl.arange(0, QUERIES, by_query)
    no_norm = gl.zeros((QUERIES,), gl.float32, by_query)
    no_acc = gl.zeros((QUERIES, WIDTH), gl.float32, acc_layout)
    eights_layout: gl.constexpr = no_acc.reshape((QUERIES, WIDTH // 8, 8)).type.layout
    # A softmax state whose maximum is set to this starts anew: its old sums get a weight of 0.
    unseen = gl.full((QUERIES,), float("-inf"), gl.float32, by_query)
    ring, records = KVRing(tiles, full, empty), Records(accs, tops, norms)
    share = lane_share(work, LANE, KV_HEADS, PROGRAMS)
    pipe = PipelineState(gl.to_tensor(0), gl.to_tensor(0))
    for turn in range(share.num_shared + share.num_own):
        shared = turn < share.num_shared
        stride = gl.where(shared, 1, 2)
        if (turn == share.num_shared) & (LANE == 1):
            pipe = advance(pipe, 1, STAGES)
        index = item_index(share, turn, PROGRAMS)
        item, kv_head = load_item(work, index // KV_HEADS), index % KV_HEADS
        keys = item_keys(item, STEP)
        divided = item.record >= 0
        # This lane's rows of the tile. Queries are ordered by row, and within a row by query head.
        skipped = gl.where(shared, LANE * ROWS, 0)
        row = skipped + query // PER_KV
        head = kv_head * PER_KV + query % PER_KV
        inside = (row < item.num_rows) & (query // PER_KV < ROWS)
        seen = item.num_keys - item.unseen
        limit = seen - (item.num_rows - 1 - row) * item.causal
        common = seen - (item.num_rows - 1 - skipped) * item.causal  # Keys that all rows see.
        # Where partial results are stored: in records, or in the lane's scratch records.
        partial_at = gl.where(
            divided,
            (item.record + row * item.num_records) * HEADS + head,
            spare + (2 * gl.program_id(0) + LANE) * QUERIES + query,
        )

        if CHAINED:
            gdc_wait()
        first_row, rows = item.first_row + skipped, item.num_rows - skipped
        _load_queries(qkv, query_tile, first_row, rows, kv_head, PER_KV, KV_HEADS, DIM)

        span, segment = Softmax(unseen, no_norm, no_acc), Softmax(unseen, no_norm, no_acc)
        walk = start_walk(item, keys)
        stored = False  # Whether the scratch records hold the merged spans so far.
        for step in range(keys.steps):
            scores, scores2 = _scores(query_tile, ring, pipe, scores_layout)
            release(ring, pipe, shared)
            pipe = advance(pipe, stride, STAGES)
            in_block = step >= keys.cached_steps
            own = item.block_rows - (step - keys.cached_steps) * STEP
            seen_by_all = gl.where(in_block, own, common - walk.here)
            if seen_by_all < STEP:
                bound = gl.where(in_block, own, limit - walk.here)
                seen_by_last = gl.where(in_block, own, seen - walk.here)
                scores, scores2 = _mask(scores, scores2, bound, seen_by_last, seen_by_all)
            segment, weights, weights2 = _weigh(segment, scores, scores2, scale, tiles.dtype)
            acc = _add_values(segment.acc, ring, pipe, weights, weights2)
            segment = Softmax(segment.top, segment.norm, acc)
            release(ring, pipe, shared)
            pipe = advance(pipe, stride, STAGES)
            walk, ends_segment = take_step(walk, keys, step, STEP)
            if ends_segment:
                span = _merge(span, segment)
                segment = Softmax(unseen, segment.norm, segment.acc)
                if ends_record(walk, keys, step):
                    last = step + 1 == keys.steps
                    acc_at, mask = _pointers(accs, partial_at * DIM, inside, DIM, WIDTH, eights_layout)
                    if stored & (divided == 0):
                        span = _merge(_load_partial(records, partial_at, acc_at, inside, mask, no_acc), span)
                    if divided | (last == 0):
                        gl.store(tops + partial_at, span.top, mask=inside)
                        gl.store(norms + partial_at, span.norm, mask=inside)
                        gl.store(acc_at, span.acc.reshape((QUERIES, WIDTH // 8, 8)), mask=mask)
                        span = Softmax(unseen, span.norm, span.acc)
                        partial_at += gl.where(divided, HEADS, 0)
                        stored = True
                walk = next_segment(walk, keys, step)
        if divided == 0:
            result = span.acc * gl.convert_layout(1.0 / gl.where(inside, span.norm, 1.0), wide)[:, None]
            goal = ((item.first_row + row) * HEADS + head).to(gl.int64) * DIM
            out_at, mask = _pointers(out, goal, inside, DIM, WIDTH, eights_layout, IN_WORDS)
            gl.store(
                out_at,
                stored_value(result, factor, out.dtype.element_ty).reshape((QUERIES, WIDTH // 8, 8)),
                mask=mask,
            )
    if CHAINED:
        gdc_wait()  # Programs without an item wait too: this launch must not finish before the previous one.
