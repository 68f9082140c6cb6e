"""The interface for constrained decoding: which tokens are allowed at each position, given the tokens before it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TokenMask(Protocol):
    """The constraint on one sequence, after its newest committed token. Only `commit` changes its state.

    error: why the sequence can't go on, or None. If it is set, the engine ends the sequence. param: the request's field that the
    constraint comes from.
    """

    @property
    def error(self) -> str | None: ...

    @property
    def param(self) -> str: ...

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        """Which tokens may come after the committed tokens and the first i of `ahead`, for i = first .. len(ahead).

        int32 [len(ahead) + 1 - first, ceil(vocab_size / 32)] on the CPU, one bit per token id, lowest first, and at least one set
        in every row. Rows after a token that is not allowed, or that ends the text, are never read.
        """
        ...

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, are allowed one after the other."""
        ...

    def commit(self, token: int) -> None:
        """Note one more committed token."""
        ...
