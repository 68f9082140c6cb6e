"""The cluster's Prometheus metrics at one address.

Ray runs an agent on every node, which exports the metrics of the node's processes: some hundreds of kilobytes. A Prometheus that
finds Ray's nodes scrapes the agents directly. `scrape` is for one that knows only the service. It has our metrics, and those of
Serve's that show the state of the service.
"""

import asyncio
from collections.abc import Iterable, Iterator

import aiohttp
import ray
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_OURS = "ray_orthrus_"
_SERVES = {
    f"ray_serve_{name}"
    for name in (
        "application_status",
        "deployment_error_counter",
        "deployment_queued_queries",
        "deployment_replica_healthy",
        "deployment_replica_starts",
        "deployment_request_counter",
        "deployment_status",
        "num_grpc_error_requests",
        "num_grpc_requests",
        "num_http_error_requests",
        "num_http_requests",
        "num_ongoing_grpc_requests",
        "num_ongoing_http_requests",
        "proxy_status",
        "replica_processing_queries",
    )
}
# Labels that are left out, because they are the same in all samples or mean nothing outside Ray.
_NO_LABELS = {
    "Component",
    "JobId",
    "SessionName",
    "Version",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
}
_PROCESS = "WorkerId"
_WANTED = tuple(start + name for start in ("", "# HELP ", "# TYPE ") for name in (_OURS, *_SERVES))
"""Prefixes of lines. All lines about the families above have one of them, and few other lines do."""
_TIMEOUT = aiohttp.ClientTimeout(total=5)


async def scrape() -> list[Metric]:
    """The metrics of all live nodes. A node that doesn't answer is left out."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        answers = await asyncio.gather(*(_get(session, url) for url in urls), return_exceptions=True)
    exports = [answer for answer in answers if isinstance(answer, str)]
    # In a thread: reading some hundreds of kilobytes would hold up streams.
    return await asyncio.to_thread(merge, exports)


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        answer.raise_for_status()
        return await answer.text()


def merge(exports: Iterable[str]) -> list[Metric]:
    """Several exports in one: each of the families above once, with the samples of all."""
    merged: dict[str, Metric] = {}
    samples: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for export in exports:
        # Nine of ten lines are of Ray's own families. Parsing those too would take half a second of a core.
        lines = [line for line in export.split("\n") if line.startswith(_WANTED)]
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            if not family.name.startswith(_OURS) and family.name not in _SERVES:
                continue
            merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            seen = samples.setdefault(family.name, {})
            for sample in _plain(family):
                # A sample may come twice, which parsers refuse.
                seen[sample.name, frozenset(sample.labels.items())] = sample
    for name, family in merged.items():
        family.samples = list(samples[name].values())
    return [merged[name] for name in sorted(merged)]


def _plain(family: Metric) -> Iterator[Sample]:
    """The samples without `_NO_LABELS`, and without the process if they name a replica."""
    for sample in family.samples:
        dropped = _NO_LABELS | {_PROCESS} if "replica" in sample.labels else _NO_LABELS
        labels = {label: value for label, value in sample.labels.items() if label not in dropped}
        yield Sample(sample.name, labels, sample.value)


def spell(metrics: list[Metric], accept: str) -> tuple[bytes, str]:
    """The metrics in the format that an Accept header asks for, OpenMetrics or Prometheus' text, and its media type."""
    encode, media_type = choose_encoder(accept)
    return encode(_Collected(metrics)), media_type


class _Collected:
    """Stands in for the registry that prometheus_client's encoders take."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics
