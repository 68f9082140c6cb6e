"""What the engine asks of a runner: row groups in, logits and picks out. The engine decides what runs, a runner how."""

from collections.abc import Sequence
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
        """float32 or wider [rows that need logits, vocab_size], until the next pass is launched.

        They hold what the pass computed only if one of its `PickRows.reads_logits`.
        """
        ...

    @property
    def first_pick(self) -> int:
        """Place of the pass's first pick among the runner's picks, which `RowGroup.tokens` of the next pass may refer to."""
        ...

    def picks(self) -> list[int]:
        """Wait for the pass. The token picked at each row of its `PickRows`, in order; `NO_TOKEN` where there is none.

        Behind all of these come the further ranks of groups that ask for them, by group, then by rank, then by row. What Medusa
        heads draft comes last, by group and then by head.
        The masks of drafts are yet to be applied: see `follow_masks`.
        """
        ...


class ModelRunner(Protocol):
    """Runs the passes of one model over one cache."""

    feeds_tokens: bool
    """Whether a pass may be launched before the host knows the picks of the one before it."""
    picks_ranks: bool
    """Whether it costs next to nothing if a row of drafts picks several tokens."""
    max_logits: int
    """Most rows of a pass that need logits."""
    row_sizes: tuple[int, ...]
    """The numbers of rows that passes are filled up to, ascending. Empty if a pass has just the rows of its groups."""

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        """Start a pass over `groups`, at least one, none empty.

        rows: how to pick from the rows that need logits, in the order of the groups. Only the last of the passes launched
        before this one may still be waited for (`LaunchedPass.picks`).
        """
        ...

    def logits(self, groups: Sequence[RowGroup]) -> Tensor:
        """Run a pass to its end, without picks. Returns the logits of the rows that need them, in memory of their own."""
        ...


class RankRunner(ModelRunner, Protocol):
    """A runner for models that several ranks may share. Each rank has one."""

    def follow(self, message: object) -> None:
        """On all ranks but 0: do this rank's part of what rank 0's runner does.

        message: what that runner told the ranks (`LayerParallelForward.ranks`).
        """
        ...


class RunnerFactory(Protocol):
    """What the registry names: the runner's class, with these as static methods."""

    def build(
        self,
        forward: LayerParallelForward,
        cache: KVCache,
        *,
        max_rows: int,
        max_logits: int,
        max_pages: int,
    ) -> RankRunner:
        """The runner of one model over one cache.

        max_rows, max_logits: most rows of a pass, and most that need logits. max_pages: most pages of all block tables of a
        pass together.
        """
        ...

    def pass_memory(
        self, forward: LayerParallelForward, page_size: int, kv_format: str, room: PassRoom, max_pages: int
    ) -> PassMemory:
        """GPU memory that the runner needs besides weights and KV cache. May run passes to find out.

        kv_format: how the cache stores keys and values, by a name in `orthrus.cache.kv_formats`. room: the largest pass.
        max_pages: see `build`.
        """
        ...
