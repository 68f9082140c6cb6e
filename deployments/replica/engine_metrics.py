"""The engine's counters as Prometheus metrics, which Ray exports on every node (docs/operations.md lists them)."""

import threading

from ray.serve.metrics import Counter, Gauge

from orthrus.engine import Engine
from orthrus.engine.stats import EngineStats

COUNTERS = {
    "passes": "Forward passes",
    "cycles": "Committing steps of all sequences: draft and verify, or one AR step",
    "committed": "Tokens that cycles committed; tokens per cycle is its rate over that of cycles",
    "preemptions": "Sequences that lost their KV pages to another and are computed again",
    "prompt_tokens": "Prompt tokens of requests that got their first token",
    "prefix_hit_tokens": "Prompt tokens that were taken from the prefix cache",
    "admitted": "Sequences that left the queue",
    "queue_wait_seconds": "Seconds that admitted sequences had waited",
    "row_use_seconds": "Seconds in passes, weighted with how full they were; its rate is the row-budget use",
}
GAUGES = {
    "running": "Sequences that take part in passes",
    "waiting": "Sequences in the queue",
    "rows_to_prefill": "Prompt rows to compute",
    "oldest_wait": "Seconds that the one in the queue which came first has waited",
    "kv_pages_used": "KV pages that sequences hold",
    "kv_pages_total": "KV pages of the cache",
}
_PERIOD_SECONDS = 1.0


class MetricsExporter:
    """Copies `EngineStats` to the metrics `orthrus_engine_*` once a second, from a thread of its own, until `close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Serve's metrics add the tags application, deployment and replica themselves.
        self._counters = {name: Counter(f"orthrus_engine_{name}", text) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(f"orthrus_engine_{name}", text) for name, text in GAUGES.items()}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orthrus-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        before: EngineStats | None = None
        while not self._closed.wait(_PERIOD_SECONDS):
            stats = self._engine.stats
            for name, counter in self._counters.items():
                grown = getattr(stats, name) - (getattr(before, name) if before is not None else 0)
                if grown > 0:
                    counter.inc(grown)
            for name, gauge in self._gauges.items():
                gauge.set(getattr(stats, name))
            before = stats
