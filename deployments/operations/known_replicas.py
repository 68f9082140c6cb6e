"""What the request routers of this process have been told of the replicas, for whoever shows it.

Serve brings the replicas' reports to every router once a second, whether or not anybody looks. So looking costs no message.
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
    """Ask `router` from now on. It is forgotten when it ends."""
    _routers[application, deployment] = router


def known_replicas(application: str, deployment: str) -> Sequence[KnownReplica] | None:
    """The replicas of a deployment that run. None: no router of ours in this process knows them."""
    router = _routers.get((application, deployment))
    return router.known_replicas() if router is not None else None
