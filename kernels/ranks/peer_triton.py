"""Exchanges between GPUs inside kernels: writing to the boxes of all ranks, raising flags, and waiting for them."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from orthrus.kernels.device import chaining
from orthrus.kernels.ranks.peer_memory import PeerMemory
from orthrus.kernels.rows import types

_COLUMNS = 4096
_NO_TOKEN: tl.constexpr = tl.constexpr(types.NO_TOKEN)


@triton.jit
def raise_flags(flags, place, number, rank, late, SIZE: tl.constexpr):
    """Set flag `place` of every other rank to `number`: what this program has written to that rank is complete.

    late: the first number of `PeerMemory.status`. After a timeout this rank's results are wrong, so it raises no more flags. The
    other ranks then time out too.
    """
    tl.debug_barrier()
    if late == 0:
        for peer in tl.static_range(SIZE):
            if peer != rank:
                flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
                tl.atomic_xchg(flag + place, number, sem="release", scope="sys")


@triton.jit
def _acquire(flag):
    """Read a flag with acquire semantics: what was written before the flag was raised may be read afterwards."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.s32 $0, [$1];", "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for(flag, number, status, sender):
    """Wait until rank `sender` has set this rank's `flag` to `number`. status: see `PeerMemory.status`.

    After the first timeout, further waits return at once: the pass ends, and its results are wrong.
    """
    seen = _acquire(flag)
    # Differences are compared, because the numbers of exchanges wrap around.
    if number - seen > 0:
        begin = globaltimer()
        limit = tl.where(tl.load(status, volatile=True) == 0, tl.load(status + 1), 0)
        while (number - seen > 0) & (globaltimer() - begin < limit):
            seen = _acquire(flag)
        if number - seen > 0:
            tl.store(status, sender + 1)


@triton.jit
def _meet(flags, counts, status, row, rows, number, rank, late, SIZE: tl.constexpr):
    """Raise the flags of a row's exchange, wait for those of all other ranks, and count it. rows: of the mailbox."""
    raise_flags(flags, rank * rows + row, number, rank, late, SIZE)
    own_flags = tl.load(flags + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(SIZE):
        if peer != rank:
            wait_for(own_flags + peer * rows + row, number, status, peer)
    tl.debug_barrier()
    tl.store(counts + row, number)


@triton.jit
def exchange_row(
    node, boxes, flags, counts, status, row, place, inside, rows, width, rank, SIZE: tl.constexpr
):
    """Write a row's partial sums to all ranks, wait for theirs, and return the sum over the tree of ranks: see `add_pairwise`.

    node: this rank's partial sums, float32 at the indices `place`, where `inside`. rows, width: of the mailbox. Every program
    must have another row.
    """
    late = tl.load(status, volatile=True)
    number = tl.load(counts + row) + 1
    turn = (number & 1).to(tl.int64) * SIZE
    goal = ((turn + rank) * rows + row) * width + place
    for peer in tl.static_range(SIZE):
        # The alignment lets a thread write and read several numbers at once.
        box = tl.multiple_of(tl.load(boxes + peer).to(tl.pointer_type(tl.float32)), 16)
        tl.store(box + goal, node, mask=inside & (peer != rank))
    _meet(flags, counts, status, row, rows, number, rank, late, SIZE)
    box = tl.multiple_of(tl.load(boxes + rank).to(tl.pointer_type(tl.float32)), 16)
    box += (turn * rows + row) * width + place
    step = rows.to(tl.int64) * width
    total = _pair(box, step, 0, node, inside, rank)
    if SIZE > 2:
        total += _pair(box, step, 2, node, inside, rank)
    if SIZE > 4:
        total += _pair(box, step, 4, node, inside, rank) + _pair(box, step, 6, node, inside, rank)
    return total


@triton.jit
def _pair(box, step, first: tl.constexpr, node, inside, rank):
    """The sum of the nodes of ranks `first` and `first` + 1. This rank's own node is `node`, and in no box."""
    return _node(box, step, first, node, inside, rank) + _node(box, step, first + 1, node, inside, rank)


@triton.jit
def _node(box, step, peer: tl.constexpr, node, inside, rank):
    # Not through the L1 cache, which does not see what other GPUs write.
    there = tl.load(box + peer * step, mask=inside & (peer != rank), other=0.0, cache_modifier=".cg")
    return tl.where(rank == peer, node, there)


@triton.jit
def _pick_kernel(
    values,
    indices,
    picks,
    first_pick,
    boxes,
    flags,
    counts,
    status,
    blocks,
    rows,
    rank,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.load(first_pick)
    place = tl.arange(0, BLOCKS)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(values + row * blocks + place, mask=place < blocks, other=float("-inf"))
    best, place = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(indices + row * blocks + place)
    late = tl.load(status, volatile=True)
    number = tl.load(counts + row) + 1
    turn = (number & 1) * SIZE
    goal = ((turn + rank) * rows + row) * 2
    for peer in tl.static_range(SIZE):
        box = tl.load(boxes + peer).to(tl.pointer_type(tl.int32)) + goal
        tl.store(box, best.to(tl.int32, bitcast=True))
        tl.store(box + 1, token)
    _meet(flags, counts, status, row, rows, number, rank, late, SIZE)
    # Of equal scores the lowest token wins, and ranks have tokens in order.
    box = tl.load(boxes + rank).to(tl.pointer_type(tl.int32))
    best = float("-inf")
    token = 0
    for peer in tl.static_range(SIZE):
        source = box + ((turn + peer) * rows + row) * 2
        score = tl.load(source, cache_modifier=".cg").to(tl.float32, bitcast=True)
        other = tl.load(source + 1, cache_modifier=".cg")
        if peer == 0:
            best, token = score, other
        else:
            better = score > best
            best, token = tl.where(better, score, best), tl.where(better, other, token)
    tl.store(picks + first + row, tl.where(best < float("inf"), token, _NO_TOKEN))


@triton.jit
def _send_logits_kernel(
    logits, wanted, goals, first_token, width, vocab, COLUMNS: tl.constexpr, CHAINED: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(wanted) != 0:
        goal = tl.load(goals).to(tl.pointer_type(tl.float32))
        value = tl.load(logits + row * width + column, mask=column < width)
        tl.store(goal + row * vocab + first_token + column, value, mask=column < width)


@triton.jit(do_not_specialize=["first", "count"])
def _send_picks_kernel(
    picks, boxes, flags, sent, status, first, count, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(picks + first + place, mask=place < count)
        for peer in tl.static_range(1, SIZE):
            box = tl.load(boxes + peer).to(tl.pointer_type(tl.int32))
            tl.store(box + place, token, mask=place < count)
    number = tl.load(sent) + 1
    raise_flags(flags, 0, number, 0, tl.load(status), SIZE)
    tl.store(sent, number)


@triton.jit(do_not_specialize=["rank", "first", "count"])
def _receive_picks_kernel(picks, boxes, flags, sent, status, rank, first, count, BLOCK: tl.constexpr):
    number = tl.load(sent) + 1
    wait_for(tl.load(flags + rank).to(tl.pointer_type(tl.int32)), number, status, 0)
    tl.debug_barrier()
    tl.store(sent, number)
    box = tl.load(boxes + rank).to(tl.pointer_type(tl.int32))
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(box + place, mask=place < count, cache_modifier=".cg")
        tl.store(picks + first + place, token, mask=place < count)


def pick_best_of_ranks(
    peers: PeerMemory, values: Tensor, indices: Tensor, picks: Tensor, first_pick: Tensor
) -> None:
    """`pick_best` (kernels/rows/sampling_triton) over the tokens of all ranks. Every rank gets the picks.

    values, indices: `best_of_blocks` of this rank's tokens. picks, first_pick: see `gumbel_argmax` (kernels/rows/sampling).
    """
    rows, blocks = values.shape
    width = triton.next_power_of_2(blocks)
    box = peers.best
    _pick_kernel[(rows,)](
        values, indices, picks, first_pick, box.boxes, box.flags, box.counts, peers.status, blocks, box.rows, peers.rank,
        BLOCKS=width, SIZE=peers.size, num_warps=max(1, min(8, width // 256)), **chaining(),
    )  # fmt: skip


def send_logits(peers: PeerMemory, logits: Tensor, wanted: Tensor, first_token: int) -> None:
    """Write this rank's logits [rows, tokens], which begin at `first_token`, to rank 0's `PeerMemory.logits`, if `wanted`.

    They have arrived once rank 0 has finished the next exchange of picks.
    """
    rows, width = logits.shape
    _send_logits_kernel[(rows, triton.cdiv(width, _COLUMNS))](
        logits, wanted, peers.logits_at, first_token, width, peers.sizes.vocabulary, COLUMNS=_COLUMNS, **chaining()
    )  # fmt: skip


def send_picks(peers: PeerMemory, picks: Tensor, first: int, count: int) -> None:
    """On rank 0: send `count` picks, from index `first` on, to the other ranks. Each of them calls `receive_picks`.

    All ranks must run a pass between two calls.
    """
    _send_picks_kernel[(1,)](
        picks, peers.picks_box, peers.picks_flag, peers.picks_sent, peers.status, first, count, BLOCK=1024, SIZE=peers.size
    )  # fmt: skip


def receive_picks(peers: PeerMemory, picks: Tensor, first: int, count: int) -> None:
    """On the other ranks: wait for what rank 0 sends, and write it to the same indices of `picks`."""
    _receive_picks_kernel[(1,)](
        picks, peers.picks_box, peers.picks_flag, peers.picks_sent, peers.status, peers.rank, first, count, BLOCK=1024
    )  # fmt: skip
