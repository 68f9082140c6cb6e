"""What the warps of the Hopper kernel share: which items a lane takes, and its way through the ring in shared memory.

Written in Gluon, Triton's language for explicit shared memory and copies; there is no interpreter for it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from orthrus.kernels.attention.items import NUM_ITEMS, NUM_SHARED


class Share(NamedTuple):
    """A lane's part of the work list: shared items first, then items of its own."""

    together: gl.tensor  # Number of shared items.
    alone: gl.tensor  # Number of its own items.
    first: gl.tensor  # Index of the first of its own, counted over items and KV heads.


class Ring(NamedTuple):
    """Places in shared memory, each for the keys or the values of a step, which are two tiles."""

    tiles: gl.shared_memory_descriptor  # [2 * places, keys, width]
    full: gl.shared_memory_descriptor  # For each place a barrier: the tiles have arrived.
    empty: gl.shared_memory_descriptor  # For each place a barrier: nobody needs the tiles any more.


class Cursor(NamedTuple):
    """Where a warp is in the ring."""

    place: gl.tensor
    phase: gl.tensor  # Turns round with every round of the ring; a barrier is waited for by it.


@gluon.jit
def lane_share(work, LANE: gl.constexpr, KV_HEADS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Shared items go round the programs; the others go on where they end, first to one lane of each program."""
    program = gl.program_id(0)
    count, shared = gl.load(work + NUM_ITEMS) * KV_HEADS, gl.load(work + NUM_SHARED) * KV_HEADS
    first = shared + (program + PROGRAMS - shared % PROGRAMS) % PROGRAMS + LANE * PROGRAMS
    together = gl.cdiv(gl.maximum(shared - program, 0), PROGRAMS)
    return Share(together, gl.cdiv(gl.maximum(count - first, 0), 2 * PROGRAMS), first)


@gluon.jit
def item_index(share, turn, PROGRAMS: gl.constexpr):
    """Which item a lane takes in its `turn`, counted over items and KV heads."""
    alone = turn - share.together
    return gl.where(
        turn < share.together, gl.program_id(0) + turn * PROGRAMS, share.first + alone * 2 * PROGRAMS
    )


@gluon.jit
def move(cursor, step, PLACES: gl.constexpr):
    """The cursor `step` places further round the ring."""
    place = cursor.place + step
    wraps = place >= PLACES
    return Cursor(gl.where(wraps, place - PLACES, place), gl.where(wraps, cursor.phase ^ 1, cursor.phase))


@gluon.jit
def give_back(ring, cursor, shared):
    """A place is free when both consumers have said so, or the one that has it for itself has said it twice."""
    if shared:
        mbarrier.arrive(ring.empty.index(cursor.place), count=1)
    else:
        mbarrier.arrive(ring.empty.index(cursor.place), count=2)
