"""Softmax over a vocabulary: a row's bits do not depend on where the row lies in memory."""

import torch
from torch import Tensor

_BYTES = 16


def log_softmax(logits: Tensor) -> Tensor:
    """The logarithm of the softmax of every row of logits [rows, vocab_size]."""
    return aligned(logits).log_softmax(-1)[:, : logits.shape[1]]


def softmax(logits: Tensor) -> Tensor:
    """The softmax of every row of logits [rows, vocab_size]."""
    return aligned(logits).softmax(-1)[:, : logits.shape[1]]


def aligned(logits: Tensor) -> Tensor:
    """logits [rows, vocab_size], contiguous, with columns of -inf behind them if rows would not begin at multiples of 16 bytes.

    On a GPU, PyTorch reads 16 bytes at a time, and the first of them depend on where a row begins. So does the order in which it
    sums the row.
    """
    missing = -logits.shape[1] % (_BYTES // logits.element_size())
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
