"""What a replica reports of itself: its size and load to request routers, and signals to the autoscaling policy.

During a rolling update the reader may have another version than the replica. So reports are read leniently: unknown keys are
ignored, and missing ones have defaults.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from orthrus.engine.engine import Engine
    from orthrus.engine.stats import EngineStats

NAME_BYTES = 8
"""How many bytes of the hash of a page or a request id are kept. A collision costs one poor choice of a replica, no more."""
MAX_REPORTED_PAGES = 2048


class Capacity(NamedTuple):
    """What one replica can hold."""

    max_num_seqs: int
    """Sequences that the engine runs at a time (`EngineConfig`)."""
    prefill_chunk: int
    """Prompt rows that a pass computes at most (`EngineConfig`)."""
    page_size: int
    """Tokens of a KV page."""
    pages: int
    """KV pages of the cache."""

    @staticmethod
    def of(engine: "Engine") -> "Capacity":
        """The capacity of an engine, which never changes."""
        config = engine.config
        return Capacity(
            config.max_num_seqs, config.prefill_chunk, engine.page_size, engine.stats.kv_pages_total
        )

    @staticmethod
    def read(published: Mapping[str, Any]) -> "Capacity | None":
        """The capacity that a replica has published as a dict, None if something is missing."""
        if any(name not in published for name in Capacity._fields):
            return None
        return Capacity(*(published[name] for name in Capacity._fields))


class Load(NamedTuple):
    """Work on a replica."""

    sequences: float = 0.0
    """Sequences that decode or wait."""
    prompts: float = 0.0
    """Prompt rows to compute, in chunks of `prefill_chunk`."""
    pages: float = 0.0
    """KV pages that sequences hold."""

    def plus(self, other: "Load", sign: int = 1) -> "Load":
        """The sum, or with `sign` -1 the difference."""
        return Load(
            self.sequences + sign * other.sequences,
            self.prompts + sign * other.prompts,
            self.pages + sign * other.pages,
        )

    def use(self, capacity: Capacity) -> float:
        """The used share of the scarcer resource, rows or pages. It is over 1 when sequences wait."""
        rows = self.sequences + self.prompts
        return max(0.0, rows / capacity.max_num_seqs, self.pages / capacity.pages)


class RoutingReport(NamedTuple):
    """A replica's load and cache at one moment, for request routers."""

    load: Load
    requests: frozenset[bytes]
    """`request_name` of each request that `load` counts."""
    prefixes: frozenset[bytes]
    """The first `NAME_BYTES` of the hash of each cached page. Of many pages, only the most recently used are named."""

    @staticmethod
    def of(engine: "Engine") -> dict[str, Any]:
        """An engine's report, as a dict of numbers and bytes. `stats` is for the web page: no router reads it."""
        stats = engine.stats
        load = Load(
            stats.running + stats.waiting,
            stats.rows_to_prefill / engine.config.prefill_chunk,
            stats.kv_pages_used,
        )
        recent = engine.recent_prefixes(MAX_REPORTED_PAGES)
        return {
            **load._asdict(),
            "requests": b"".join(request_name(request_id) for request_id in engine.live_requests()),
            "prefixes": b"".join(name[:NAME_BYTES] for name in recent),
            "stats": counters(stats),
        }

    @staticmethod
    def read(report: Mapping[str, Any]) -> "RoutingReport":
        """The report of a replica of any version."""
        return RoutingReport(
            Load(*(report.get(name, 0.0) for name in Load._fields)),
            frozenset(_names(report.get("requests", b""))),
            frozenset(_names(report.get("prefixes", b""))),
        )


def counters(stats: "EngineStats") -> dict[str, Any]:
    """An engine's statistics as numbers. `oldest_wait` is a duration in seconds: other processes have another clock."""
    named = asdict(stats)
    del named["oldest_queued_at"]
    return named | {"oldest_wait": stats.oldest_wait}


def request_name(request_id: str) -> bytes:
    """The name of a request in reports."""
    return hashlib.blake2b(request_id.encode(), digest_size=NAME_BYTES).digest()


def _names(joined: bytes) -> list[bytes]:
    return [joined[i : i + NAME_BYTES] for i in range(0, len(joined), NAME_BYTES)]


def engine_load(before: "EngineStats", now: "EngineStats", seconds: float) -> dict[str, float]:
    """The signals of one replica for `EngineLoadPolicy`, over the `seconds` from `before` to `now`.

    row_use: how full the passes were over all that time, 0 to 1.
    queue_wait: seconds that the first request in the queue has waited.
    kv_use: part of the KV pages that requests hold.
    admitted_rate: sequences per second that got a slot.
    tokens_per_cycle: since the engine's start, if nothing was decoded in that time.
    """
    cycles = now.cycles - before.cycles
    return {
        # A pass counts in full when it ends, even if it began before the window.
        "row_use": min(1.0, (now.row_use_seconds - before.row_use_seconds) / seconds),
        "queue_wait": now.oldest_wait,
        "kv_use": now.kv_pages_used / now.kv_pages_total,
        "admitted_rate": (now.admitted - before.admitted) / seconds,
        "tokens_per_cycle": (now.committed - before.committed) / cycles if cycles else now.tokens_per_cycle,
    }
