"""Gumbel noise on a GPU: the counters of `kernels.sampling`, hashed and turned into noise in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _gumbel_kernel(keys, out, vocab, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(keys + row * 2).to(tl.uint32)
    second = tl.load(keys + row * 2 + 1).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) * 0x9E3779B1 + first) ^ second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    # -log(1 - u), by its series where 1 - u would round u's digits away.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    exponential = tl.where(u < 0.015625, series, -tl.log(1.0 - u))
    tl.store(out + row * vocab + token, -tl.log(exponential), mask=token < vocab)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise float32 [rows, vocab_size] from the rows' keys int64 [rows, 2], each below 2**32."""
    rows = keys.shape[0]
    out = torch.empty(rows, vocab_size, device=keys.device, dtype=torch.float32)
    _gumbel_kernel[(rows, triton.cdiv(vocab_size, _COLUMNS))](keys, out, vocab_size, COLUMNS=_COLUMNS)
    return out
