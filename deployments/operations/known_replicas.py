"""What the request routers of this process know of the replicas, for the web page.

Serve sends the replicas' reports to every router once a second in any case. So reading them here costs no message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary


@dataclass(frozen=True)
class KnownReplica:
    """A running replica, as a router knows it."""

    name: str
    """As in the metrics' label `replica`."""
    capacity: Mapping[str, Any]
    """`Capacity` as a dict; empty while unknown (deployments/replica/reports.py)."""
    report: Mapping[str, Any]
    """Its last report for routers; empty while there is none."""


class KnowsReplicas(Protocol):
    """A request router of ours."""

    def known_replicas(self) -> Sequence[KnownReplica]:
        """The replicas that run."""
        ...


_routers: WeakValueDictionary[tuple[str, str], KnowsReplicas] = WeakValueDictionary()


def show_router(application: str, deployment: str, router: KnowsReplicas) -> None:
    """Register a router, which `known_replicas` then asks, until the router is garbage collected."""
    _routers[application, deployment] = router


def known_replicas(application: str, deployment: str) -> Sequence[KnownReplica] | None:
    """The running replicas of a deployment. None if this process has no router of ours for it."""
    router = _routers.get((application, deployment))
    return router.known_replicas() if router is not None else None
