"""Rows of tokens for training. They depend on seed and row number only, so a resumed run gets the same rows."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from orthrus.errors import ConfigError


class TokenStream:
    """Documents packed into one stream of token ids. Training reads it in rows of equal length."""

    def __init__(self, tokens: np.ndarray, name: str) -> None:
        """tokens: integers [tokens]; name: for messages."""
        self._tokens = torch.from_numpy(tokens.astype(np.int32))
        self._name = name

    def __len__(self) -> int:
        return len(self._tokens)

    def per_epoch(self, length: int) -> int:
        """Rows of `length` tokens in one pass over the stream. Raises ConfigError if the stream is too short for one row."""
        # One row fewer, because each epoch starts at an offset.
        rows = len(self) // length - 1
        if rows < 1:
            raise ConfigError(
                f"{self._name} has {len(self)} tokens, too few for rows of {length}: add text or shorten row_length"
            )
        return rows

    def rows(self, first: int, count: int, length: int, seed: int) -> Tensor:
        """Rows `first` to `first` + `count` of an endless sequence: token ids int64 [count, length].

        Every epoch cuts the stream into rows at another offset, and takes them in another order.
        """
        per_epoch = self.per_epoch(length)
        starts = torch.empty(count, dtype=torch.int64)
        for i in range(count):
            epoch, index = divmod(first + i, per_epoch)
            offset, order = _epoch(per_epoch, length, seed, epoch)
            starts[i] = offset + order[index] * length
        return self._at(starts, length)

    def even_rows(self, count: int, length: int) -> Tensor:
        """Token ids int64 [count, length] spread evenly over the stream, for evaluation."""
        return self._at(torch.linspace(0, len(self) - length, count).long(), length)

    def _at(self, starts: Tensor, length: int) -> Tensor:
        return self._tokens[starts[:, None] + torch.arange(length)].long()


def mixed_rows(
    sources: Sequence[tuple[int, TokenStream]], length: int, seed: int
) -> Callable[[int, range], Tensor]:
    """Returns a function (step, range of rows in the step) -> token ids of these rows, int64 [rows, length].

    sources: streams, each with its number of rows in a step. Rows of the first source come first.
    """

    def tokens(step: int, rows: range) -> Tensor:
        parts, before = [], 0
        for count, source in sources:
            wanted = range(max(rows.start - before, 0), min(rows.stop - before, count))
            if wanted:
                parts.append(source.rows(step * count + wanted.start, len(wanted), length, seed))
            before += count
        return torch.cat(parts)

    return tokens


@lru_cache(maxsize=8)
def _epoch(rows: int, length: int, seed: int, epoch: int) -> tuple[int, Tensor]:
    """The offset of an epoch's first row, and the order of its rows."""
    generator = torch.Generator().manual_seed((seed << 32) + epoch)
    return int(torch.randint(0, length, (), generator=generator)), torch.randperm(rows, generator=generator)
