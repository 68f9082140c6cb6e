"""Gumbel noise and picks on a GPU. The noise is that of `sampling`, made in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from orthrus.kernels.device import chaining
from orthrus.kernels.rows import types

_COLUMNS = 1024
PICK_COLUMNS = 4096
"""Tokens of a block, if only the best token of a row is picked."""
FURTHER_COLUMNS = 1024
"""Tokens of a block, if the best tokens of a few further blocks are picked too."""
_RANK_COLUMNS = 128
_BY_ROW = ["temperatures", "keys", "picks", "further"]
"""Arguments that may point to any row of a pass. Kernels are not specialized on their alignment, which would compile them again
during a request."""
NO_TOKEN: tl.constexpr = tl.constexpr(types.NO_TOKEN)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(keys, row, token):
    """Noise of a row's tokens, from its keys."""
    first = tl.load(keys + row * 2).to(tl.uint32)
    second = tl.load(keys + row * 2 + 1).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) * 0x9E3779B1 + first) ^ second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    # -log(1 - u), by its series where 1 - u would round u's digits away.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    exponential = tl.where(u < 0.015625, series, -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def perturb(logits, temperature, keys, row, token):
    """logits / temperature + noise: the scores that are compared if the temperature is not 0."""
    return tl.div_rn(logits, temperature) + _noise(keys, row, token)


@triton.jit
def nan_to_inf(score):
    """The scores with NaN replaced by infinity. A maximum would ignore NaN. `pick_best` gives a row with infinity `NO_TOKEN`."""
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _gumbel_kernel(keys, out, vocab, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + row * vocab + token, _noise(keys, row, token), mask=token < vocab)


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=_BY_ROW)
def _block_argmax_kernel(
    logits,
    temperatures,
    keys,
    values,
    indices,
    vocab,
    blocks,
    first_token,
    COLUMNS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    temperature = tl.load(temperatures + row)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    score = tl.load(logits + row * vocab + column, mask=column < vocab, other=float("-inf"))
    if temperature > 0:
        noisy = perturb(score, temperature, keys, row, first_token + column)
        score = tl.where(column < vocab, noisy, float("-inf"))
    value, index = tl.max(nan_to_inf(score), 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * blocks + block, value)
    tl.store(indices + row * blocks + block, first_token + block * COLUMNS + index)


@triton.jit(do_not_specialize_on_alignment=_BY_ROW)
def _scores_kernel(
    logits, temperatures, keys, chosen, scores, vocab, COLUMNS: tl.constexpr, CHAINED: tl.constexpr
):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    at = row * tl.num_programs(1) + place
    token = tl.load(chosen + at).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    score = tl.load(logits + row * vocab + token, mask=token < vocab, other=float("-inf"))
    if temperature > 0:
        score = tl.where(token < vocab, perturb(score, temperature, keys, row, token), float("-inf"))
    tl.store(scores + at * COLUMNS + tl.arange(0, COLUMNS), nan_to_inf(score))


@triton.jit(do_not_specialize_on_alignment=_BY_ROW)
def _argmax_kernel(
    values,
    indices,
    picks,
    first_pick,
    further,
    blocks,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.load(first_pick)
    place = tl.arange(0, BLOCKS)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(values + row * blocks + place, mask=place < blocks, other=float("-inf"))
    best, chosen = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(indices + row * blocks + chosen)
    tl.store(picks + first + row, tl.where(best < float("inf"), token, NO_TOKEN))
    for rank in tl.static_range(RANKS):
        value = tl.where(place == chosen, float("-inf"), value)
        best, chosen = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(indices + row * blocks + chosen)
        finite = (best > float("-inf")) & (best < float("inf"))
        tl.store(further + row * RANKS + rank, tl.where(finite, token, NO_TOKEN))


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """See `sampling.gumbel_noise`."""
    rows = keys.shape[0]
    out = torch.empty(rows, vocab_size, device=keys.device, dtype=torch.float32)
    _gumbel_kernel[(rows, triton.cdiv(vocab_size, _COLUMNS))](keys, out, vocab_size, COLUMNS=_COLUMNS)
    return out


def gumbel_argmax(
    logits: Tensor, temperatures: Tensor, keys: Tensor, picks: Tensor, first_pick: Tensor
) -> None:
    """See `gumbel_argmax` (kernels/rows/sampling). One kernel finds the best token of every block, and another the best block."""
    pick_best(*best_of_blocks(logits, temperatures, keys), picks, first_pick)


def best_of_blocks(
    logits: Tensor, temperatures: Tensor, keys: Tensor, columns: int = PICK_COLUMNS, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """The highest score of every block of tokens, noise included, and its token: float32 and int32 [rows, blocks].

    columns: tokens of a block, a power of two. first_token: the token of the first logit. A block with a score of NaN gets
    infinity.
    """
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, columns)
    values = torch.empty(rows, blocks, device=logits.device, dtype=torch.float32)
    indices = torch.empty(rows, blocks, device=logits.device, dtype=torch.int32)
    _block_argmax_kernel[(rows, blocks)](
        logits, temperatures, keys, values, indices, vocab, blocks, first_token,
        COLUMNS=columns, num_warps=min(8, columns // 32), **chaining()
    )  # fmt: skip
    return values, indices


def best_tokens(logits: Tensor, temperatures: Tensor, keys: Tensor, ranks: int) -> Tensor:
    """See `best_tokens` (kernels/rows/sampling). Only the `ranks` blocks with the highest best scores are searched."""
    rows, vocab = logits.shape
    values, _ = best_of_blocks(logits, temperatures, keys, _RANK_COLUMNS)
    chosen = values.topk(min(ranks, values.shape[1])).indices
    scores = torch.empty(rows, chosen.shape[1] * _RANK_COLUMNS, device=logits.device, dtype=torch.float32)
    _scores_kernel[chosen.shape](
        logits, temperatures, keys, chosen, scores, vocab, COLUMNS=_RANK_COLUMNS, num_warps=1, **chaining()
    )
    best = scores.topk(ranks)
    tokens = chosen.gather(1, best.indices // _RANK_COLUMNS) * _RANK_COLUMNS + best.indices % _RANK_COLUMNS
    return tokens.masked_fill_(~best.values.isfinite(), NO_TOKEN.value).int()


def pick_best(
    values: Tensor, indices: Tensor, picks: Tensor, first_pick: Tensor, further: Tensor | None = None
) -> None:
    """For every row, pick the index that has the highest value. Of equal values the first wins.

    values: float32 [rows, blocks]. A row whose highest value is infinite gets `NO_TOKEN`.
    indices: int32 [rows, blocks].
    picks, first_pick: see `gumbel_argmax` (kernels/rows/sampling).
    further: int32 [rows, ranks], contiguous. The indices with the next highest values are written to it.
    """
    rows, blocks = values.shape
    width = triton.next_power_of_2(blocks)
    _argmax_kernel[(rows,)](
        values,
        indices,
        picks,
        first_pick,
        picks if further is None else further,
        blocks,
        BLOCKS=width,
        RANKS=0 if further is None else further.shape[1],
        num_warps=max(1, min(8, width // 256)),
        **chaining(),
    )
