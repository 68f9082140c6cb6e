"""Runs passes: row groups in, logits and picks out. The engine decides what runs, a runner how.

`EagerRunner` runs a pass at once, in plain PyTorch: CPUs, and float64 anywhere. `orthrus/cuda_graphs.py` has the one for GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orthrus.kv_cache import KVCache
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import PassPlan, RowGroup
from orthrus.sampling import PickRows, pick


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


@dataclass(frozen=True)
class _Done:
    logits: Tensor
    first_pick: int
    tokens: list[list[int]]

    def picks(self) -> list[list[int]]:
        return self.tokens


class EagerRunner:
    """Runs every pass to its end before `launch` returns.

    feeds_tokens: nothing is gained by it here, but the engine can be tested as it works with a runner that does.
    """

    max_logits = 1 << 30

    def __init__(self, forward: LayerParallelForward, cache: KVCache, feeds_tokens: bool = False) -> None:
        self.feeds_tokens = feeds_tokens
        self._forward = forward
        self._cache = cache
        # Of two passes, like those of a runner that does not wait.
        self._picks = [[0], [0]]

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        logits = self.logits(groups)
        tokens = pick(logits, rows) if rows else []
        self._picks = [self._picks[1], [token for group in tokens for token in group]]
        return _Done(logits, len(self._picks[0]), tokens)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        plan = PassPlan.build(
            groups,
            page_size=self._cache.page_size,
            heads_per_kv=self._forward.heads_per_kv,
            device=self._forward.device,
        )
        picks = torch.tensor(self._picks[0] + self._picks[1], dtype=torch.int32, device=plan.tokens.device)
        hidden = self._forward.hidden_states(plan, self._cache, picks)
        return self._forward.logits(hidden[plan.logit_rows])
