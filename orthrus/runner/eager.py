"""The runner of CPUs, and of float64 anywhere: every pass runs at once, in plain PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.malloc import keep_freed_memory
from orthrus.models.forward import LayerParallelForward
from orthrus.models.stack import LayerStack
from orthrus.plan import FlatRows, PassPlan, RowGroup, flatten
from orthrus.runner.head_picks import head_picks
from orthrus.runner.pass_memory import PassMemory, PassRoom
from orthrus.runner.protocol import LaunchedPass, RunnerLimits
from orthrus.runner.sampler import PickRows, pick

_ROOM = 1 << 16
"""Most picks of a pass."""


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
    """Rank 0's message for a pass."""

    rows: FlatRows
    """Its rows. Tokens that refer to picks have been replaced by these picks."""


class EagerRunner:
    """See `ModelRunner`. Runs every pass to its end before `launch` returns."""

    picks_ranks = False
    max_logits = 1 << 30
    row_sizes: tuple[int, ...] = ()

    def __init__(self, forward: LayerParallelForward, cache: KVCache, feeds_tokens: bool = False) -> None:
        """feeds_tokens: True gains nothing here. Tests set it to run the engine as with a runner that does not wait."""
        self.feeds_tokens = feeds_tokens
        self._forward = forward
        self._cache = cache
        # Picks of the last two passes, as in a runner that does not wait. Those of every other pass begin at place _ROOM.
        self._picks = torch.zeros(2 * _ROOM, dtype=torch.int32, device=forward.device)
        self._first_pick = 0

    @staticmethod
    def build(forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> "EagerRunner":
        """See `RunnerFactory`. It runs passes of any size."""
        keep_freed_memory()
        return EagerRunner(forward, cache)

    @staticmethod
    def pass_memory(
        forward: LayerParallelForward, page_size: int, kv_format: str, room: PassRoom, max_pages: int
    ) -> PassMemory:
        """See `RunnerFactory`. On a GPU, where it runs float64 only, this is what graphs would need."""
        from orthrus.runner.cuda_graphs import CudaGraphRunner  # Needs Triton.

        return CudaGraphRunner.pass_memory(forward, page_size, kv_format, room, max_pages)

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        if any(group.behind is not None for group in groups):
            groups, rows = _placed(groups, rows, self._picks)
        hidden, stack = self._tell_and_run(groups)
        logits = self._forward.logits(hidden, stack)
        tokens = pick(logits, rows) if rows else []
        if any(part.heads for part in rows):
            tokens += head_picks(
                self._forward, hidden, torch.tensor(tokens, device=hidden.device), rows
            ).tolist()
        self._first_pick = first = _ROOM - self._first_pick
        self._picks[first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        return _Done(logits, first, tokens)

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        return self._forward.logits(*self._tell_and_run(groups))

    def _tell_and_run(self, groups: Sequence[RowGroup]) -> tuple[Tensor, LayerStack]:
        """Run a pass on all ranks. Returns what `_run` does."""
        rows = flatten(groups, self._cache.page_size)
        # The other ranks have no picks.
        message = RunPass(replace(rows, tokens=_known(rows.tokens, self._picks)))
        self._forward.ranks.tell(message)
        return self._run(message)

    def follow(self, message: object) -> None:
        assert isinstance(message, RunPass)
        self._forward.logits(*self._run(message))

    def _run(self, message: RunPass) -> tuple[Tensor, LayerStack]:
        """Run a pass. Returns the final hidden states of the rows that need logits, and the weights that it ran on."""
        rows = message.rows
        self._cache.copy_pages(torch.from_numpy(rows.copies.ravel()), len(rows.copies))
        plan = PassPlan.of(
            rows,
            page_size=self._cache.page_size,
            heads_per_kv=self._forward.heads_per_kv,
            device=self._forward.device,
        )
        stack = self._forward.stack_for(ar=rows.num_ar > 0, diffusion=rows.num_ar < len(rows.tokens))
        hidden = self._forward.hidden_states(plan, self._cache, self._picks, stack)
        return hidden[plan.logit_rows], stack


def _known(tokens: np.ndarray, picks: Tensor) -> np.ndarray:
    """`FlatRows.tokens`, with references to picks replaced by the picked tokens, and by 0 for `NO_TOKEN`."""
    picked = picks.numpy(force=True)[np.maximum(-1 - tokens, 0)]
    return np.where(tokens < 0, np.maximum(picked, 0), tokens).astype(np.int32)


def _placed(
    groups: Sequence[RowGroup], rows: Sequence[PickRows], picks: Tensor
) -> tuple[list[RowGroup], list[PickRows]]:
    """The same pass, in which each block that comes behind drafts in flight is moved to where `picks` put it."""
    first_logits = list(accumulate((group.num_logits for group in groups), initial=0))
    first_rows = list(accumulate((part.count for part in rows), initial=0))
    placed, picking = list(groups), list(rows)
    for index, group in enumerate(groups):
        if group.behind is None:
            continue
        behind, first_pick = group.behind, group.behind.first_pick
        last, right = behind.right(picks[first_pick : first_pick + len(behind.drafts) + 1].tolist())
        missing = behind.furthest - right
        tokens = [-1 - (first_pick + last + 1), *group.tokens[1:]]
        table = group.block_table
        if (tree := behind.tree) is not None:
            table = table[: tree.first_page] + list(tree.pages[tree.groups[last] if last >= 0 else 0])
        placed[index] = replace(
            group, tokens=tokens, start=group.start - missing, block_table=table, behind=None
        )
        part = first_rows.index(first_logits[index])
        picking[part] = replace(rows[part], position=rows[part].position - missing)
    return placed, picking
