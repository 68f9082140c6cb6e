"""Counts of an engine's work so far, and of its work to do: a snapshot that any thread may read."""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Taken after a step, and whenever a request comes or is cancelled. Counters first, then the state at that time."""

    passes: int
    """Forward passes."""
    cycles: int
    """Cycles of all sequences: see `orthrus.schedules.protocol.Turn.ends_cycle`."""
    committed: int
    """Tokens that these cycles committed. Tokens per cycle is the ratio of the two."""
    preemptions: int
    """Sequences that lost their pages to another one."""
    prompt_tokens: int
    """Prompt tokens of the sequences that got their first token."""
    prefix_hit_tokens: int
    """How many of these were found in the cache."""
    admitted: int
    """Sequences that left the queue."""
    queue_wait_seconds: float
    """How long these had waited in all."""
    row_use_seconds: float
    """Time spent in passes, each weighted with `Scheduler.row_use`. Its rate is the use of the row budget."""
    running: int
    """Sequences that take part in passes."""
    waiting: int
    """Sequences in the queue."""
    rows_to_prefill: int
    """Prompt rows that are still to be computed for all of them."""
    oldest_queued_at: float | None
    """When the sequence that has been in the queue longest entered it, in monotonic seconds; None if none waits."""
    kv_pages_used: int
    """Pages that sequences hold."""
    kv_pages_total: int
    """Pages of the cache."""

    @property
    def oldest_wait(self) -> float:
        """The longest wait of a sequence in the queue by now, in seconds; 0.0 if none waits.

        It keeps growing during a pass, however long that takes.
        """
        return 0.0 if self.oldest_queued_at is None else time.monotonic() - self.oldest_queued_at

    @property
    def tokens_per_cycle(self) -> float:
        return self.committed / self.cycles if self.cycles else 1.0
