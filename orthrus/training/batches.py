"""Rows of tokens for training: a pure function of seed and step, so that a resumed run sees what the unbroken one saw."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class TokenStream:
    """Packed documents as one stream of token ids; a row starts anywhere in it."""

    tokens: Tensor

    @classmethod
    def from_numpy(cls, ids: np.ndarray, device: torch.device) -> "TokenStream":
        return cls(torch.from_numpy(ids.astype(np.int32)).to(device))

    def rows(self, count: int, length: int, seed: int, step: int) -> Tensor:
        """Token ids int64 [count, length] at random offsets."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        starts = torch.randint(0, len(self.tokens) - length + 1, (count,), generator=generator)
        index = starts[:, None] + torch.arange(length)
        return self.tokens[index.to(self.tokens.device)].long()

    def even_rows(self, count: int, length: int) -> Tensor:
        """Token ids int64 [count, length] spread evenly over the stream, for evaluation."""
        starts = torch.linspace(0, len(self.tokens) - length, count).long()
        index = starts[:, None] + torch.arange(length)
        return self.tokens[index.to(self.tokens.device)].long()


@dataclass
class TokenRows:
    """Rows of equal length [count, length], such as the model's own samples."""

    tokens: Tensor

    def rows(self, count: int, length: int, seed: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 32) + step)
        chosen = torch.randint(0, len(self.tokens), (count,), generator=generator)
        return self.tokens[chosen.to(self.tokens.device), :length].long()
