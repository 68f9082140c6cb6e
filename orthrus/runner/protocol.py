"""What the engine asks of a runner: row groups in, logits and picks out. The engine decides what runs, a runner how."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from orthrus.plan import RowGroup
from orthrus.runner.sampler import PickRows


class LaunchedPass(Protocol):
    """A pass on its way.

    logits: float32 or wider [rows that need them, vocab_size], until the next pass is launched; of use only if one of its
    `PickRows` reads logits.
    """

    @property
    def logits(self) -> Tensor: ...

    @property
    def first_pick(self) -> int:
        """Place of its first pick among the runner's: what `RowGroup.tokens` refers to, if the runner feeds tokens."""
        ...

    def picks(self) -> list[list[int]]:
        """Wait for the pass. The token at every row of the groups that need logits, one list per group."""
        ...


class ModelRunner(Protocol):
    """feeds_tokens: whether a pass may be launched before the host knows the picks of the one before it.

    max_logits: most rows of a pass that need logits.
    """

    feeds_tokens: bool
    max_logits: int

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        """Start a pass over `groups`. rows: how to pick, for each group that needs logits.

        Of the passes before it, all but the last have been waited for (`LaunchedPass.picks`).
        """
        ...

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        """Run a pass and return its logits, in memory of their own."""
        ...
