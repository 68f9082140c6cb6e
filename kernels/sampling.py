"""Gumbel noise from a counter-based generator: a pure function of seed, position and token id.

argmax(logits / T + noise) is a draw from softmax(logits / T) (the Gumbel-max trick). Both views use the same noise at
a position, so a good draft is the token that plain decoding with that seed picks, and sampled text needs no rejection sampler.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def _mix64(x: int) -> int:
    """SplitMix64's finaliser (Steele et al., 2014): 64 bits to 64 well-mixed bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit keys of a row's noise."""
    mixed = _mix64((_mix64((seed + 0x9E3779B97F4A7C15) & _MASK64) + position * 0x9E3779B97F4A7C15) & _MASK64)
    return mixed & _MASK32, mixed >> 32


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 values below 2**32 (torch lacks unsigned shifts on 32-bit integers)."""
    x = (x ^ (x >> 16)).mul_(0x85EBCA6B).bitwise_and_(_MASK32)
    x = (x ^ (x >> 13)).mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    return x ^ (x >> 16)


def gumbel_noise(seeds: list[int], positions: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [rows, vocab_size] float32 for rows with these seeds and positions."""
    keys = torch.tensor([noise_keys(s, p) for s, p in zip(seeds, positions, strict=True)], device=device)
    if device.type == "cuda":
        from kernels import sampling_triton

        return sampling_triton.gumbel_noise(keys, vocab_size)
    token = torch.arange(vocab_size, device=device).mul_(0x9E3779B1)
    bits = _mix32((token + keys[:, :1]) & _MASK32).bitwise_xor_(keys[:, 1:])
    # A small u, finely spaced, is large noise: the tail that decides. The upper clamp keeps the noise finite.
    u = (_mix32(bits).to(torch.float32) + 0.5) * 2.0**-32
    return torch.log1p(-u.clamp_(max=1 - 2.0**-24)).neg_().log_().neg_()
