"""The interface of runners: row groups in, logits and picks out. The engine decides what runs, and the runner decides how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from orthrus.cache.kv_cache import KVCache
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup
from orthrus.runner.pass_memory import PassMemory, PassRoom
from orthrus.runner.sampler import PickRows


class LaunchedPass(Protocol):
    """A pass that has been launched, and may still run."""

    @property
    def logits(self) -> Tensor:
        """float32 or wider [rows that need logits, vocab_size]. Overwritten when the next pass is launched.

        They are written only if at least one `PickRows` of the pass has `reads_logits`.
        """
        ...

    @property
    def first_pick(self) -> int:
        """Place of the pass's first pick among the runner's picks, which `RowGroup.tokens` of the next pass may refer to."""
        ...

    def picks(self) -> list[int]:
        """Wait for the pass. Returns the token picked at each row of its `PickRows`, in order; `NO_TOKEN` where there is none.

        After these come the further ranks of groups that ask for them, by group, then by rank, then by row. The drafts of Medusa
        heads come last, by group and then by head. The masks of drafts have not been applied yet: see `follow_masks`.
        """
        ...


class ModelRunner(Protocol):
    """Runs the passes of one model over one cache."""

    feeds_tokens: bool
    """Whether a pass may be launched before the host knows the picks of the one before it."""
    picks_ranks: bool
    """Whether a row of drafts picks several tokens at almost no cost."""
    max_logits: int
    """Most rows of a pass that need logits."""
    row_sizes: tuple[int, ...]
    """The numbers of rows that passes are padded to, ascending. Empty if passes are not padded."""

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        """Start a pass over `groups`, at least one, none empty.

        rows: how to pick from the rows that need logits, in the order of the groups. Of the passes launched before this one, only
        the last may be in flight: `LaunchedPass.picks` of all others must have been called.
        """
        ...

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        """Run a pass to its end, without picks. Returns the logits of the rows that need them, in memory of their own."""
        ...


class RankRunner(ModelRunner, Protocol):
    """A runner for models that several ranks may share. Each rank has one."""

    def follow(self, message: object) -> None:
        """On all ranks except 0: do this rank's part of what rank 0's runner does.

        message: what that runner has sent to the ranks (`LayerParallelForward.ranks`).
        """
        ...


@dataclass(frozen=True)
class RunnerLimits:
    """What the passes of a runner may need."""

    max_rows: int
    """Most rows of a pass."""
    max_logits: int
    """Most rows of a pass that need logits."""
    max_pages: int
    """Most pages of all block tables of a pass together."""
    wants_ranks: bool = False
    """Whether passes are going to ask for several tokens of a row (`PickRows.ranks`). If not, they may still ask, but then logits
    are stored for it."""


class RunnerFactory(Protocol):
    """What the registry names: the runner's class, with these as static methods."""

    def build(self, forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> RankRunner:
        """The runner of one model over one cache."""
        ...

    def pass_memory(
        self, forward: LayerParallelForward, page_size: int, kv_format: str, room: PassRoom, max_pages: int
    ) -> PassMemory:
        """GPU memory that the runner needs besides weights and KV cache. May run passes to find out.

        kv_format: how the cache stores keys and values, by a name in `orthrus.cache.kv_formats`. room: the largest pass.
        max_pages: as in `RunnerLimits`.
        """
        ...
