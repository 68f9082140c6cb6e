"""A runner that works ahead as a GPU's does, and checks that the engine keeps within that runner's limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orthrus.engine import Engine
from orthrus.plan import RowGroup
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows


@dataclass
class _ReadPass:
    """Records that its picks have been read."""

    launched: LaunchedPass
    read: bool = False

    @property
    def logits(self) -> torch.Tensor:
        return self.launched.logits

    @property
    def first_pick(self) -> int:
        return self.launched.first_pick

    def picks(self) -> list[int]:
        self.read = True
        return self.launched.picks()


class LimitedRunner(EagerRunner):
    """Runs passes ahead, within the limits of a GPU's runner: memory is fixed before the first pass, and logits that are not read
    do not exist.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.forward, engine.cache, feeds_tokens=True)
        self._most_rows, self._most_logits = engine.limits.max_rows, engine.limits.max_logits
        self._passes: list[_ReadPass] = []
        self.fullest = 0

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        used = sum(len(group.tokens) for group in groups)
        assert used <= self._most_rows
        assert sum(group.num_logits for group in groups) <= self._most_logits
        assert all(launched.read for launched in self._passes[:-1]), (
            "plans of two passes have memory, not of three"
        )
        self.fullest = max(self.fullest, used)
        launched = super().launch(groups, rows)
        if rows and not any(group.reads_logits for group in rows):
            with torch.inference_mode():
                launched.logits.fill_(float("nan"))
        self._passes.append(_ReadPass(launched))
        return self._passes[-1]
