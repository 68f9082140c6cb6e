"""Gumbel noise from a counter-based generator, and the picks that are made with it.

The noise is a pure function of seed, position and token id. argmax(logits / T + noise) is a draw from softmax(logits / T):
the Gumbel-max trick. Both views use the same noise at a position. So a good draft is the same token that AR decoding with that
seed picks, and sampled text needs no rejection sampler.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from orthrus.kernels.device import runs_triton
from orthrus.kernels.rows.types import NO_TOKEN

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014): 64 bits to 64 well-mixed bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise_keys(seeds: ArrayLike, positions: ArrayLike) -> np.ndarray:
    """A 64-bit key for each row's noise, from its seed below 2**64 and its position: int32 [rows, 2], 32 bits in each."""
    golden = np.uint64(_GOLDEN)
    seeds, positions = np.asarray(seeds, np.uint64), np.asarray(positions, np.uint64)
    mixed = _mix64(_mix64(np.atleast_1d(seeds) + golden) + np.atleast_1d(positions) * golden)
    keys = np.stack([mixed & np.uint64(_MASK32), mixed >> np.uint64(32)], -1)
    return keys.astype(np.uint32).view(np.int32)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, on int64 values below 2**32: PyTorch has no unsigned shifts of 32-bit integers."""
    x = (x ^ (x >> 16)).mul_(0x85EBCA6B).bitwise_and_(_MASK32)
    x = (x ^ (x >> 13)).mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    return x ^ (x >> 16)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise float32 [rows, vocab_size] from `noise_keys`, int32 [rows, 2]."""
    if keys.is_cuda:
        from orthrus.kernels.rows import sampling_triton

        return sampling_triton.gumbel_noise(keys, vocab_size)
    wide = keys.long() & _MASK32
    token = torch.arange(vocab_size, device=keys.device).mul_(0x9E3779B1)
    bits = _mix32((token + wide[:, :1]) & _MASK32).bitwise_xor_(wide[:, 1:])
    # A small u makes large noise, which decides picks. Near 0 floats are finely spaced. The clamp keeps the noise finite.
    u = (_mix32(bits).to(torch.float32) + 0.5) * 2.0**-32
    return torch.log1p(-u.clamp_(max=1 - 2.0**-24)).neg_().log_().neg_()


def argmax(scores: Tensor) -> Tensor:
    """The best token of every row of scores [rows, vocab_size]: int64 [rows]; `NO_TOKEN` for a row with NaN or infinity."""
    best = scores.argmax(-1)
    # Tensor.argmax treats NaN as the largest number.
    return best.masked_fill_(~(scores.gather(1, best[:, None]).squeeze(1) < float("inf")), NO_TOKEN)


def best_tokens(logits: Tensor, temperatures: Tensor, keys: Tensor, ranks: int) -> Tensor:
    """The `ranks` tokens with the highest scores of every row, the best first: int32 [rows, ranks].

    A score that is NaN or infinite gives `NO_TOKEN`.
    logits, temperatures, keys: see `gumbel_argmax`.
    """
    if runs_triton(logits):
        from orthrus.kernels.rows import sampling_triton

        return sampling_triton.best_tokens(logits, temperatures, keys, ranks)
    scores = logits
    if bool(temperatures.any()):
        noisy = logits / temperatures[:, None] + gumbel_noise(keys, logits.shape[1])
        scores = torch.where(temperatures[:, None] > 0, noisy, logits)
    best = scores.topk(ranks)
    return best.indices.masked_fill_(~best.values.isfinite(), NO_TOKEN).int()


def gumbel_argmax(
    logits: Tensor, temperatures: Tensor, keys: Tensor, picks: Tensor, first_pick: Tensor
) -> None:
    """Pick a token for every row: argmax(logits / T + noise), or argmax(logits) where T is 0. Of equal scores the lowest id wins.

    A row with a score of NaN or infinity gets `NO_TOKEN`. A score of -inf marks a token that must not be picked.

    logits: float32 or wider [rows, vocab_size].
    temperatures: float32 [rows].
    keys: int32 [rows, 2] from `noise_keys`.
    picks: int32. The rows' picks are written to it, from index `first_pick` (int32 [1]) on.
    """
    if runs_triton(logits):
        from orthrus.kernels.rows import sampling_triton

        sampling_triton.gumbel_argmax(logits, temperatures, keys, picks, first_pick)
        return
    chosen = argmax(logits)
    sampled = temperatures.nonzero().flatten()
    if len(sampled):
        scores = logits[sampled] / temperatures[sampled, None]
        chosen[sampled] = argmax(scores + gumbel_noise(keys[sampled], logits.shape[1]))
    first = int(first_pick)
    picks[first : first + len(chosen)] = chosen.to(picks.dtype)
