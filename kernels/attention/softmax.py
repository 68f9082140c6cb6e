"""Online softmax over keys, to base 2 (Milakov and Gimelshein, 2018), and its states in memory."""

from typing import NamedTuple

import triton
import triton.language as tl

from orthrus.kernels.rounding_triton import stored_value


class Softmax(NamedTuple):
    """The state of an online softmax over the keys so far, for some queries."""

    top: tl.tensor  # Maximum of the scores [queries]; -inf before the first key.
    norm: tl.tensor  # Sum of the weights, 2 ** (score - top) [queries].
    acc: tl.tensor  # Sum of the values times their weights [queries, width].


class Records(NamedTuple):
    """States in memory. A record is the state of one row and query head."""

    accs: tl.tensor  # Pointer to float32 [records, dim].
    tops: tl.tensor  # Pointer to float32 [records].
    norms: tl.tensor  # Pointer to float32 [records].


@triton.jit
def initial(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """The state before any key."""
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    return Softmax(top, tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, WIDTH), tl.float32))


@triton.jit
def update(soft, query, keys, values, scale, visible):
    """The state after these keys [keys, width], as far as they are `visible` [queries, keys].

    Multiply-adds are explicit, so that this rounds alike wherever the compiler inlines it.
    """
    scores = tl.dot(query, keys.T, input_precision="ieee")
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(soft.top, tl.max(scores, 1) * scale)
    # The maximum of a row that has seen no key is -inf. Any finite base works for it, since all its weights are zero.
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - base[:, None]))
    rescale = tl.exp2(soft.top - base)
    norm = tl.fma(soft.norm, rescale, tl.sum(weights, 1))
    acc = tl.dot(weights.to(values.dtype), values, soft.acc * rescale[:, None], input_precision="ieee")
    return Softmax(top, norm, acc)


@triton.jit
def merge(first, second):
    """The state over the keys of both. The initial state changes no bit of the other."""
    top = tl.maximum(first.top, second.top)
    base = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2(first.top - base), tl.exp2(second.top - base)
    norm = tl.fma(first.norm, old, second.norm * new)
    acc = tl.fma(first.acc, tl.broadcast_to(old[:, None], first.acc.shape), second.acc * new[:, None])
    return Softmax(top, norm, acc)


@triton.jit
def result(soft, inside, factor, dtype: tl.constexpr):
    """The weighted mean of the values, acc / norm [queries, width]. Where not `inside`, it is any finite number.

    factor: what it is multiplied by if `dtype` is e4m3, see `Rounding`.
    """
    return stored_value(soft.acc * (1.0 / tl.where(inside, soft.norm, 1.0))[:, None], factor, dtype)


@triton.jit
def load(records, at, inside, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Load the states of the records `at` [queries]. Where not `inside`, it is the initial state."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    top = tl.load(records.tops + at, mask=inside, other=float("-inf"))
    norm = tl.load(records.norms + at, mask=inside, other=0.0)
    acc = tl.load((records.accs + at * DIM)[:, None] + dims[None, :], mask=mask, other=0.0)
    return Softmax(top, norm, acc)


@triton.jit
def store(records, at, inside, soft, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Store the states to the records `at` [queries], where `inside`."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(records.tops + at, soft.top, mask=inside)
    tl.store(records.norms + at, soft.norm, mask=inside)
    tl.store((records.accs + at * DIM)[:, None] + dims[None, :], soft.acc, mask=mask)
