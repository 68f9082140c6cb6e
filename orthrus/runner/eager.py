"""The runner of CPUs, and of float64 anywhere: every pass runs at once, in plain PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.malloc import keep_freed_memory
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import FlatRows, PassPlan, RowGroup, flatten
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows, pick


@dataclass(frozen=True)
class _Done:
    """See `LaunchedPass`."""

    logits: Tensor
    first_pick: int
    tokens: list[int]

    def picks(self) -> list[int]:
        return self.tokens


@dataclass(frozen=True)
class RunPass:
    """What rank 0 tells the other ranks of a pass."""

    rows: FlatRows
    picks: list[int]
    """Those of the last two passes."""


class EagerRunner:
    """See `ModelRunner`. Runs every pass to its end before `launch` returns."""

    max_logits = 1 << 30

    def __init__(self, forward: LayerParallelForward, cache: KVCache, feeds_tokens: bool = False) -> None:
        """feeds_tokens: gains nothing here, but tests the engine as it works with a runner that does not wait."""
        self.feeds_tokens = feeds_tokens
        self._forward = forward
        self._cache = cache
        # Of the last two passes, as in a runner that does not wait.
        self._picks = [[0], [0]]

    @staticmethod
    def build(
        forward: LayerParallelForward, cache: KVCache, *, max_rows: int, max_logits: int, max_pages: int
    ) -> "EagerRunner":
        """See `RunnerFactory`. It runs passes of any size."""
        keep_freed_memory()
        return EagerRunner(forward, cache)

    @staticmethod
    def pass_bytes(
        forward: LayerParallelForward, page_size: int, kv_format: str, *, max_rows: int, max_logits: int
    ) -> int:
        """See `RunnerFactory`. On a GPU, where it runs float64 only, it is given as much as graphs would need."""
        from orthrus.runner.cuda_graphs import CudaGraphRunner  # Needs Triton.

        return CudaGraphRunner.pass_bytes(
            forward, page_size, kv_format, max_rows=max_rows, max_logits=max_logits
        )

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        logits = self.logits(groups)
        tokens = pick(logits, rows) if rows else []
        self._picks = [self._picks[1], tokens]
        return _Done(logits, len(self._picks[0]), tokens)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        message = RunPass(flatten(groups, self._cache.page_size), self._picks[0] + self._picks[1])
        self._forward.ranks.tell(message)
        return self._run(message)

    def follow(self, message: object) -> None:
        assert isinstance(message, RunPass)
        self._run(message)

    def _run(self, message: RunPass) -> Tensor:
        """Run a pass. Returns the logits of the rows that need them."""
        rows = message.rows
        plan = PassPlan.of(
            rows,
            page_size=self._cache.page_size,
            heads_per_kv=self._forward.heads_per_kv,
            device=self._forward.device,
        )
        picks = torch.tensor(message.picks, dtype=torch.int32, device=plan.tokens.device)
        stack = self._forward.stack_for(ar=rows.num_ar > 0, diffusion=rows.num_ar < len(rows.tokens))
        hidden = self._forward.hidden_states(plan, self._cache, picks, stack)
        return self._forward.logits(hidden[plan.logit_rows], stack)
