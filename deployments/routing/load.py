"""How much a replica can hold and has to do, as it tells request routers, and what a request will add to that."""

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from orthrus.requests.request import Request

if TYPE_CHECKING:
    from orthrus.engine import Engine

NAME_BYTES = 8
"""Of the hash of a page or a request id, enough for routing: a collision costs one wrong preference."""
MAX_REPORTED_PAGES = 2048
_TYPICAL_OUTPUT_TOKENS = 256
"""Most answers end long before their limit; reports correct what this gets wrong."""


class Capacity(NamedTuple):
    """What one replica can hold. Row and page budgets are those of `EngineConfig`."""

    max_num_seqs: int
    prefill_chunk: int
    page_size: int
    pages: int


class Load(NamedTuple):
    """Work on a replica: its sequences, decoding or waiting; prompt rows to compute, in chunks of `prefill_chunk`; KV pages."""

    sequences: float = 0.0
    prompts: float = 0.0
    pages: float = 0.0

    def plus(self, other: "Load", sign: int = 1) -> "Load":
        return Load(
            self.sequences + sign * other.sequences,
            self.prompts + sign * other.prompts,
            self.pages + sign * other.pages,
        )

    def use(self, capacity: Capacity) -> float:
        """Part of the capacity taken, of that resource of which most is taken; over 1 when sequences wait."""
        rows = self.sequences + self.prompts
        return max(0.0, rows / capacity.max_num_seqs, self.pages / capacity.pages)


def replica_capacity(engine: "Engine") -> dict[str, int]:
    """`Capacity` as a replica publishes it when it is ready."""
    config = engine.config
    return Capacity(
        config.max_num_seqs, config.prefill_chunk, engine.page_size, engine.stats.kv_pages_total
    )._asdict()


def replica_report(engine: "Engine") -> dict[str, Any]:
    """A replica's `Load`, names of the requests that it counts, and of the pages that its cache holds, those used last."""
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
    }


def request_load(request: Request, capacity: Capacity, cached_pages: int = 0) -> Load:
    """What a request will take of a replica that holds `cached_pages` of its prompt."""
    params, prompt = request.params, len(request.prompt)
    output = min(params.max_tokens or _TYPICAL_OUTPUT_TOKENS, _TYPICAL_OUTPUT_TOKENS)
    pages = (prompt + params.n * output) / capacity.page_size - cached_pages
    return Load(params.n, (prompt - cached_pages * capacity.page_size) / capacity.prefill_chunk, pages)


def request_name(request_id: str) -> bytes:
    """What stands for a request in a report."""
    return hashlib.blake2b(request_id.encode(), digest_size=NAME_BYTES).digest()
