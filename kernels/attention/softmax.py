"""Running softmax over keys, to base 2 (Milakov and Gimelshein, 2018), and where partial ones are kept in memory."""

from typing import NamedTuple

import triton
import triton.language as tl


class Softmax(NamedTuple):
    """What some queries have made of the keys that they have seen so far."""

    top: tl.tensor  # Highest score [queries]; -inf before the first key.
    norm: tl.tensor  # Sum of the keys' weights, 2 ** (score - top) [queries].
    acc: tl.tensor  # Sum of the values by these weights [queries, width].


class Records(NamedTuple):
    """Memory for softmaxes, each of one row and query head."""

    accs: tl.tensor  # Pointer to float32 [places, dim].
    tops: tl.tensor  # Pointer to float32 [places].
    norms: tl.tensor  # Pointer to float32 [places].


@triton.jit
def nothing(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """The softmax of queries that have seen no key."""
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    return Softmax(top, tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, WIDTH), tl.float32))


@triton.jit
def see(soft, query, keys, values, scale, visible):
    """The softmax after `visible` [queries, keys] of these keys.

    Multiply-adds are spelt out, so that every place that inlines this rounds alike.
    """
    scores = tl.dot(query, keys.T, input_precision="ieee")
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.maximum(soft.top, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet: any finite value will do, its weights are zero.
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - base[:, None]))
    fade = tl.exp2(soft.top - base)
    norm = tl.fma(soft.norm, fade, tl.sum(weights, 1))
    acc = tl.dot(weights.to(values.dtype), values, soft.acc * fade[:, None], input_precision="ieee")
    return Softmax(top, norm, acc)


@triton.jit
def merge(first, second):
    """The softmax over both's keys. One that has seen nothing changes no bit of the other."""
    top = tl.maximum(first.top, second.top)
    base = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2(first.top - base), tl.exp2(second.top - base)
    norm = tl.fma(first.norm, old, second.norm * new)
    acc = tl.fma(first.acc, tl.broadcast_to(old[:, None], first.acc.shape), second.acc * new[:, None])
    return Softmax(top, norm, acc)


@triton.jit
def result(soft, inside, dtype: tl.constexpr):
    """The weighted mean of the values [queries, width]; where not `inside`, anything finite."""
    return (soft.acc * (1.0 / tl.where(inside, soft.norm, 1.0))[:, None]).to(dtype)


@triton.jit
def load(records, at, inside, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The softmaxes at these places [queries]; where not `inside`, nothing."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    top = tl.load(records.tops + at, mask=inside, other=float("-inf"))
    norm = tl.load(records.norms + at, mask=inside, other=0.0)
    acc = tl.load((records.accs + at * DIM)[:, None] + dims[None, :], mask=mask, other=0.0)
    return Softmax(top, norm, acc)


@triton.jit
def store(records, at, inside, soft, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Put softmaxes at these places [queries], where `inside`."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(records.tops + at, soft.top, mask=inside)
    tl.store(records.norms + at, soft.norm, mask=inside)
    tl.store((records.accs + at * DIM)[:, None] + dims[None, :], soft.acc, mask=mask)
