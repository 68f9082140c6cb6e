"""The epilogue of the stream kernels: the tree of leaves, scales, biases, SiLU, picks, and storing the results.

Written in Gluon, Triton's language for explicit shared memory and copies. Gluon has no interpreter.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from orthrus.kernels.linear.stream import silu_mul, unit_of
from orthrus.kernels.rounding_triton import stored_place, stored_value
from orthrus.kernels.rows.sampling_triton import nan_to_inf, perturb


class Picking(NamedTuple):
    """The arguments for picking from the outputs of an LM head: five pointers, and a token. See `hopper.launch`."""

    temperatures: gl.tensor
    keys: gl.tensor
    out_wanted: gl.tensor
    best: gl.tensor  # The best score of each row and tile.
    best_tokens: gl.tensor  # The token of that score.
    first_token: gl.tensor


@gluon.jit
def join_leaf(acc, leaf, one, two, four, PART_LEAVES: gl.constexpr):
    """Add the sum of a leaf to the tree of a part. one, two, four: nodes of so many leaves that wait for their neighbour.

    Returns the largest node that this leaf completes, and the nodes that wait. After the last leaf it is the tree's sum.
    """
    if PART_LEAVES > 1:
        if leaf % 2 == 0:
            one = acc
        else:
            acc = one + acc
            if PART_LEAVES > 2:
                if leaf % 4 == 1:
                    two = acc
                else:
                    acc = two + acc
                    if PART_LEAVES > 4:
                        if leaf % 8 == 3:
                            four = acc
                        else:
                            acc = four + acc
    return acc, one, two, four


@gluon.jit
def output_scales(scales, unit, num_outs, OUTS: gl.constexpr, layout: gl.constexpr):
    """The scale of each output of a unit, for sums of this layout. Loaded before the K-loop, which hides the latency."""
    index = unit.out_at + gl.arange(0, OUTS, gl.SliceLayout(1, layout))
    return gl.load(scales + unit.weight_at - unit.out_at + index, mask=index < num_outs, other=0.0)


@gluon.jit
def _best(logits, index, first_token, row, live, temperatures, keys, vocab):
    """For each row, the highest score among a tile's tokens and that token, as in `gumbel_argmax`. logits [tokens, rows].

    index: indices of the tile's outputs. vocab: number of the layer's outputs. Output 0 is the token `first_token`.
    """
    token = first_token + index
    score = logits
    temperature = gl.load(temperatures + row, mask=live, other=0.0)
    if gl.max(temperature, 0) > 0.0:
        warm = (temperature > 0.0)[None, :]
        divisor = gl.where(temperature > 0.0, temperature, 1.0)[None, :]
        noisy = perturb(logits, divisor, keys, gl.where(live, row, 0)[None, :], token[:, None])
        score = gl.where(warm, noisy, logits)
    score = nan_to_inf(gl.where((index < vocab)[:, None], score, float("-inf")))
    best = gl.max(score, 0)
    return best, gl.min(gl.where(score == best[None, :], token[:, None], first_token + vocab - 1), 0)


@gluon.jit
def finish(
    acc,
    number,
    grid,
    bias,
    out,
    picking,
    factor,
    GATED: gl.constexpr,
    SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PICKS: gl.constexpr,
    IN_WORDS: gl.constexpr,
):
    """Store the sums of a unit, [outs, rows], or pick from them. picking: `Picking` if PICKS, else not used.

    factor, IN_WORDS: how they are stored if `out` is e4m3, see `Rounding`.
    """
    OUTS: gl.constexpr = acc.shape[0]
    ROWS: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    num_outs = grid.work.num_outs
    unit = unit_of(number, grid, OUTS, ROWS)
    row_index = unit.row_at + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    live = row_index < unit.row_end
    out_at, width = unit.out_at, num_outs
    if HAS_BIAS:
        shift = gl.where(unit.row_at >= grid.ar_rows, num_outs, 0)
        index = out_at + gl.arange(0, OUTS, gl.SliceLayout(1, layout))
        offset = gl.load(bias + shift + index, mask=index < num_outs, other=0.0)
        acc += offset.to(gl.float32)[:, None]
    result = acc
    if GATED:
        result = silu_mul(acc, OUTS, ROWS)
        out_at, width = out_at // 2, num_outs // 2
    index = out_at + gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    inside = live[None, :] & (index < width)[:, None]
    stored = True
    if PICKS:
        stored = gl.load(picking.out_wanted) != 0
        temperatures, keys = picking.temperatures, picking.keys
        first_token = picking.first_token
        best, token = _best(result, index, first_token, row_index, live, temperatures, keys, width)
        tile = row_index * gl.cdiv(width, OUTS) + out_at // OUTS
        gl.store(picking.best + tile, best, mask=live)
        gl.store(picking.best_tokens + tile, token, mask=live)
    if stored:
        goal = row_index[None, :].to(gl.int64) * width + stored_place(index, IN_WORDS)[:, None]
        if SPLIT:
            goal += unit.part * grid.work.num_rows.to(gl.int64) * num_outs
        gl.store(out + goal, stored_value(result, factor, out.dtype.element_ty), mask=inside)
