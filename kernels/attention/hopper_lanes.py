"""What producers and consumers of the Hopper attention kernel have in common: a lane's items, and the ring buffer.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from orthrus.kernels.attention.items import NUM_ITEMS, NUM_SHARED


class Share(NamedTuple):
    """A lane's part of the work list: shared items first, then items of its own. An item is counted once per KV head."""

    num_shared: gl.tensor
    num_own: gl.tensor
    first: gl.tensor  # Index of its first own item.


class Ring(NamedTuple):
    """A ring buffer in shared memory. A place (pipeline stage) holds the keys or the values of a step: two tiles."""

    tiles: gl.shared_memory_descriptor  # [2 * places, keys, width]
    full: gl.shared_memory_descriptor  # An mbarrier per place: its tiles have arrived.
    empty: gl.shared_memory_descriptor  # An mbarrier per place: the consumers have released it.


class Cursor(NamedTuple):
    """A warp's position in the ring."""

    place: gl.tensor
    phase: gl.tensor  # The phase of the place's mbarriers. It flips each time the cursor wraps around.


@gluon.jit
def lane_share(work, LANE: gl.constexpr, KV_HEADS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Deal the items round-robin: shared ones to the programs, then the others to lane 0 of each program, then to lane 1."""
    program = gl.program_id(0)
    count, shared = gl.load(work + NUM_ITEMS) * KV_HEADS, gl.load(work + NUM_SHARED) * KV_HEADS
    first = shared + (program + PROGRAMS - shared % PROGRAMS) % PROGRAMS + LANE * PROGRAMS
    num_shared = gl.cdiv(gl.maximum(shared - program, 0), PROGRAMS)
    return Share(num_shared, gl.cdiv(gl.maximum(count - first, 0), 2 * PROGRAMS), first)


@gluon.jit
def item_index(share, turn, PROGRAMS: gl.constexpr):
    """Index of the item that a lane takes in iteration `turn`, with items counted once per KV head."""
    own = turn - share.num_shared
    return gl.where(
        turn < share.num_shared, gl.program_id(0) + turn * PROGRAMS, share.first + own * 2 * PROGRAMS
    )


@gluon.jit
def advance(cursor, step, PLACES: gl.constexpr):
    """The cursor `step` places further."""
    place = cursor.place + step
    wraps = place >= PLACES
    return Cursor(gl.where(wraps, place - PLACES, place), gl.where(wraps, cursor.phase ^ 1, cursor.phase))


@gluon.jit
def release(ring, cursor, shared):
    """Release a place to the producers. Its mbarrier expects two arrivals: one from each consumer, or two from the only one."""
    if shared:
        mbarrier.arrive(ring.empty.index(cursor.place), count=1)
    else:
        mbarrier.arrive(ring.empty.index(cursor.place), count=2)
