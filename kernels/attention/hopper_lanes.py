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


class KVRing(NamedTuple):
    """A ring buffer in shared memory. A stage holds the keys or the values of a step: two tiles."""

    tiles: gl.shared_memory_descriptor  # [2 * stages, keys, width]
    full: gl.shared_memory_descriptor  # An mbarrier per stage: its tiles have arrived.
    empty: gl.shared_memory_descriptor  # An mbarrier per stage: the consumers have released it.


class PipelineState(NamedTuple):
    """The stage of a ring buffer that a warp is at."""

    stage: gl.tensor
    phase: gl.tensor  # The phase of the stage's mbarriers. It flips each time the ring wraps around.


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
def advance(pipe, step, STAGES: gl.constexpr):
    """The state `step` stages later."""
    stage = pipe.stage + step
    wraps = stage >= STAGES
    return PipelineState(gl.where(wraps, stage - STAGES, stage), gl.where(wraps, pipe.phase ^ 1, pipe.phase))


@gluon.jit
def release(ring, pipe, shared):
    """Release a stage to the producers. Its mbarrier expects two arrivals: one from each consumer, or two from the only one."""
    if shared:
        mbarrier.arrive(ring.empty.index(pipe.stage), count=1)
    else:
        mbarrier.arrive(ring.empty.index(pipe.stage), count=2)
