"""The parts of the events for the page's cluster view: replicas, autoscaling decisions, the deployment's state, metrics."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from prometheus_client import Metric
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState

from orthrus.deployments.operations.decisions import read_decisions
from orthrus.deployments.operations.known_replicas import known_replicas
from orthrus.deployments.operations.status import ModelStatus
from orthrus.deployments.page.feed import Part

_OURS = "ray_orthrus_"
_LATENCIES = {
    "first_token": "time_to_first_token_seconds",
    "inter_token": "inter_token_latency_seconds",
    "whole": "e2e_request_latency_seconds",
}


class Cluster:
    """What one application knows of its replicas and its callers."""

    def __init__(
        self, replica: DeploymentHandle, status: ModelStatus, scrape: Callable[[], Awaitable[list[Metric]]]
    ) -> None:
        self._replica, self._status, self._scrape = replica, status, scrape

    @property
    def parts(self) -> list[tuple[Part, int]]:
        """The parts of a feed. Each comes with every event, or with every second, fifth or tenth one, by what it costs.

        Replicas cost nothing, since the router in this process has their reports. Decisions: one read of a key-value store.
        State: 50 ms of a core, in Serve. Metrics: a request to every node.
        """
        return [(self.replicas, 1), (self.decisions, 2), (self.state, 5), (self.metrics, 10)]

    async def replicas(self) -> dict[str, Any]:
        """`replicas`: the capacity and the engine's counters of each. Null if the config names a router that is not ours."""
        self._replica.options()  # Creates the handle's router, if no request has done so yet.
        known = known_replicas(self._status.application, self._status.deployment)
        if known is None:
            return {"replicas": None}
        return {
            "replicas": [
                {"name": replica.name, "capacity": replica.capacity, "stats": replica.report.get("stats", {})}
                for replica in known
            ]
        }

    async def decisions(self) -> dict[str, Any]:
        """`decisions`: the last ones of the autoscaling policy."""
        name = self._status.application, self._status.deployment
        return {"decisions": await asyncio.to_thread(read_decisions, *name)}

    async def state(self) -> dict[str, Any]:
        """`deployment`: its status, and how many replicas are in each state."""
        told = await self._status.deployment_status()
        states = {ReplicaState(state).value: count for state, count in told.replica_states.items()}
        deployment = {
            "status": DeploymentStatus(told.status).value,
            "message": told.message,
            "replicas": states,
        }
        return {"deployment": deployment}

    async def metrics(self) -> dict[str, Any]:
        """`requests`: how many ended in which way, and histograms of their latencies, of all ingresses since their start."""
        return {"requests": request_metrics(await self._scrape(), self._status.application)}


def request_metrics(families: Iterable[Metric], application: str) -> dict[str, Any]:
    """Counts by outcome under `outcomes`, and a histogram for each of `_LATENCIES`.

    A histogram is pairs of an upper bound in seconds and a cumulative count. The last bound is null, for infinity.
    """
    outcomes: Counter[str] = Counter()
    latencies: dict[str, defaultdict[float, float]] = {name: defaultdict(float) for name in _LATENCIES}
    by_family = {f"{_OURS}{metric}_bucket": name for name, metric in _LATENCIES.items()}
    for family in families:
        for sample in family.samples:
            if sample.labels.get("application") != application:
                continue
            if sample.name == f"{_OURS}requests_total":
                outcomes[sample.labels["outcome"]] += int(sample.value)
            elif (name := by_family.get(sample.name)) is not None:
                latencies[name][float(sample.labels["le"])] += sample.value
    return {
        "outcomes": dict(outcomes),
        **{
            name: [[bound if bound != float("inf") else None, counts[bound]] for bound in sorted(counts)]
            for name, counts in latencies.items()
        },
    }
