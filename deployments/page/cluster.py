"""The parts of an event of the cluster's feed: replicas, the deployment's state with autoscaling decisions, request metrics."""

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
        """What a feed tells, and how many events apart.

        Replicas: the router in this process has their reports anyway. Decisions: one look into a store. State: Serve takes 50 ms
        of a core for it. Metrics: all nodes are asked.
        """
        return [(self.replicas, 1), (self.decisions, 2), (self.state, 5), (self.metrics, 10)]

    async def replicas(self) -> dict[str, Any]:
        """`replicas`: of each its capacity and its engine's counters. Null: the config names a router that is not ours."""
        self._replica.options()  # Makes the handle's router, if no request has.
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
        """`deployment`: its state, and how many replicas are in each state of theirs."""
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
    """Counts by `outcome`, and for each of `_LATENCIES` pairs of an upper bound in seconds and a cumulative count.

    The last bound is null: it has none.
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
