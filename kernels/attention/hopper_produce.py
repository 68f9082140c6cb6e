"""The producer warps of the Hopper attention kernel. They only issue the TMA loads of keys and values, ahead of the consumers.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from orthrus.kernels.attention.hopper_lanes import KVRing, PipelineState, advance, item_index, lane_share
from orthrus.kernels.attention.items import item_keys, load_item
from orthrus.kernels.gluon_names import async_load, reinterpret


class Pages(NamedTuple):
    """The cache pages of a step's two tiles."""

    first: gl.tensor
    second: gl.tensor


@gluon.jit
def _look_up(table, at, end, KEYS: gl.constexpr, PAGE: gl.constexpr):
    """The pages of the step that begins at position `at`. From `end` on it is page 0, which belongs to no sequence."""
    first = gl.load(table + at // PAGE, mask=at < end, other=0)
    second = gl.load(table + (at + KEYS) // PAGE, mask=at + KEYS < end, other=0)
    return Pages(first, second)


@gluon.jit
def _fetch(source, row, row2, column, ring, stage):
    """Issue the loads of a step's two tiles, which begin at `row` and at `row2` of the source."""
    async_load(source, [row, column], ring.full.index(stage), ring.tiles.index(2 * stage))
    async_load(source, [row2, column], ring.full.index(stage), ring.tiles.index(2 * stage + 1))


@gluon.jit
def _fetch_end(source, slot, slot2, count, pieces, full, stage, KEYS: gl.constexpr):
    """Issue the loads of a step that has only `count` keys, piece by piece. Pieces past the end repeat the last one.

    pieces: the ring in pieces of a few keys and up to 64 dimensions, in the order in which they lie in a tile.
    """
    PIECE: gl.constexpr = source.block_shape[0]
    PARTS: gl.constexpr = pieces.shape[0] * PIECE // (2 * full.shape[0] * KEYS)
    last = (count - 1) // PIECE
    for number in range(2 * KEYS // PIECE):
        wanted = gl.minimum(number, last) * PIECE
        row = gl.where(wanted < KEYS, slot, slot2 - KEYS) + wanted
        piece = (2 * stage + number * PIECE // KEYS) * (PARTS * KEYS // PIECE) + number % (KEYS // PIECE)
        for part in gl.static_range(PARTS):
            async_load(
                source,
                [row, part * source.block_shape[1]],
                full.index(stage),
                pieces.index(piece + part * (KEYS // PIECE)),
            )


@gluon.jit
def produce(
    k_pages, v_pages, k_pieces, v_pieces, rows_desc, work, num_slots, tiles, full, empty,
    LANE: gl.constexpr, KV_HEADS: gl.constexpr, PER_KV: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr,
    PROGRAMS: gl.constexpr, TRIMS_END: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Fill the lane's stages. Of shared items lane 0 loads the keys and lane 1 the values. Of its own a lane loads both in turn.

    Keys that this pass does not write are loaded before `gdc_wait`, while earlier kernels of the stream still run.
    """
    STAGES: gl.constexpr = full.shape[0]
    KEYS: gl.constexpr = tiles.shape[1]
    STEP: gl.constexpr = 2 * KEYS
    PIECE: gl.constexpr = k_pieces.block_shape[0]
    PART: gl.constexpr = k_pieces.block_shape[1]
    PIECES: gl.constexpr = 2 * STAGES * KEYS * tiles.shape[2] // (PIECE * PART)
    LAYOUT: gl.constexpr = k_pieces.layout
    pieces = reinterpret(tiles, [PIECES, PIECE, PART], LAYOUT)
    step_bytes: gl.constexpr = STEP * tiles.shape[2] * tiles.dtype.primitive_bitwidth // 8
    ring = KVRing(tiles, full, empty)
    share = lane_share(work, LANE, KV_HEADS, PROGRAMS)
    pipe = PipelineState(gl.to_tensor(LANE), gl.to_tensor(0))
    waits = CHAINED  # Whether earlier kernels of the stream may still be running.
    for turn in range(share.num_shared + share.num_own):
        index = item_index(share, turn, PROGRAMS)
        item, kv_head = load_item(work, index // KV_HEADS), index % KV_HEADS
        keys = item_keys(item, STEP)
        table = work + item.table_at
        kinds = gl.where(turn < share.num_shared, 1, 2)
        # Pages are looked up one step ahead: the load overlaps the wait for an empty stage.
        pages = _look_up(table, keys.begin, keys.end, KEYS, PAGE)
        for step in range(keys.steps):
            at = keys.begin + step * STEP
            next_at = at + STEP
            next_pages = _look_up(table, next_at, keys.end, KEYS, PAGE)
            in_block = step >= keys.cached_steps
            if waits & (in_block | (gl.minimum(next_at, keys.end) > item.writes_from)):
                gdc_wait()
                waits = False
            first_slot = kv_head * num_slots
            slot, slot2 = (
                first_slot + pages.first * PAGE + at % PAGE,
                first_slot + pages.second * PAGE + (at + KEYS) % PAGE,
            )
            row = item.block_row + (step - keys.cached_steps) * STEP
            for own_kind in range(kinds):
                values = gl.where(kinds == 1, LANE, own_kind)
                mbarrier.wait(empty.index(pipe.stage), pipe.phase ^ 1)
                mbarrier.expect(full.index(pipe.stage), step_bytes)
                if in_block:
                    column = (KV_HEADS * (PER_KV + values) + kv_head) * DIM
                    _fetch(rows_desc, row, row + KEYS, column, ring, pipe.stage)
                elif TRIMS_END & (keys.end - at < STEP):
                    if values == 0:
                        _fetch_end(k_pieces, slot, slot2, keys.end - at, pieces, full, pipe.stage, KEYS)
                    else:
                        _fetch_end(v_pieces, slot, slot2, keys.end - at, pieces, full, pipe.stage, KEYS)
                elif values == 0:
                    _fetch(k_pages, slot, slot2, 0, ring, pipe.stage)
                else:
                    _fetch(v_pages, slot, slot2, 0, ring, pipe.stage)
                pipe = advance(pipe, 2, STAGES)
            pages = next_pages
