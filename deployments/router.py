"""The request router for Ray Serve: it chooses the replica of each request. FastAPI's routers are in the folders of the APIs.

Requests wait in the queue of a `PrefixBalancer` until a replica has room for them.

Clients may name a session, in the header (over gRPC, the metadata) `x-session-id` or as `prompt_cache_key`. Every ingress then
prefers the same replica for it. Replicas publish their `Capacity` once, and every `request_routing_stats_period_s` a
`RoutingReport` of their load and their cached prefixes.

The queue is served as soon as this router learns of room: when one of its requests ends, with a report, and with a new replica.
It does not learn when another router's request ends. So while requests wait, it polls the replicas for their number of requests.
It also does after a replica could not be reached, until that one answers: an idle replica has nothing new to report.
"""

import asyncio
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util.metrics import Counter

from orthrus.deployments.operations.known_replicas import KnownReplica, show_router
from orthrus.deployments.replica.reports import Capacity
from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.requests.request import Request

_ASK_SECONDS = 0.25
"""Time between two polls of all replicas, while requests wait."""
_ANSWER_SECONDS = 0.5


class PrefixRouter(RequestRouter):
    """Routes requests by a `PrefixBalancer`. `request_router_kwargs` in a config are the arguments of `check_settings`."""

    @staticmethod
    def check_settings(load_bound: float = 1.25, affinity_floor: float = 0.1) -> PrefixBalancer:
        """A balancer with these settings. Raises ValueError, naming the setting, for one out of range, and TypeError."""
        return PrefixBalancer(load_bound, affinity_floor)

    def initialize_state(self, **settings: float) -> None:
        self._balancer = self.check_settings(**settings)
        # By request id: the future that gives each waiting request its replica.
        self._grants: dict[str, asyncio.Future[ReplicaID]] = {}
        self._asking: asyncio.Task[None] | None = None
        show_router(self.app_name, self._deployment_id.name, self)
        self._routed = Counter(
            "orthrus_routed_requests",
            "Requests by what spoke for their replica: a cached prefix, their session, or load alone",
            ("application", "deployment", "by"),
        ).set_default_tags({"application": self.app_name, "deployment": self._deployment_id.name})

    def known_replicas(self) -> list[KnownReplica]:
        return [
            KnownReplica(
                replica.replica_id.unique_id, replica.replica_metadata or {}, replica.routing_stats or {}
            )
            for replica in self._replicas_list
        ]

    @property
    def max_num_routing_tasks(self) -> int:
        """One task for each waiting request. The balancer has the queue, and these tasks only sleep."""
        return self.num_pending_requests

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Without this, Serve would retry without a pause when no replica is chosen.
        pending_request.routing_context.should_backoff = True
        request = _request(pending_request)
        if request is None or not self._balancer.has_replicas:
            return [candidate_replicas]
        replica_id = await self._wait_for_room(request, pending_request.metadata.session_id)
        if replica_id not in self._replicas:
            return []
        # Otherwise Serve would ask the replica for its queue length. Less 1, because Serve adds this request when it sends it.
        self.on_new_queue_len_info(replica_id, self._balancer.requests(replica_id) - 1)
        return [[self._replicas[replica_id]]]

    async def _wait_for_room(self, request: Request, session: str) -> ReplicaID:
        """Wait until a replica has room for a request. Its load then counts the request."""
        self._balancer.add(request, session)
        grant = self._grants[request.request_id] = self._event_loop.create_future()
        try:
            self._dispatch()
            self._keep_asking()
            return await grant
        except asyncio.CancelledError:
            self._end(request.request_id)
            raise
        finally:
            del self._grants[request.request_id]

    def _dispatch(self) -> None:
        for request_id, replica_id in self._balancer.dispatch():
            grant = self._grants.get(request_id)
            if grant is None or grant.done():
                self._balancer.done(request_id)  # It was cancelled meanwhile.
            else:
                grant.set_result(replica_id)

    def _keep_asking(self) -> None:
        if self._balancer.must_hear and (self._asking is None or self._asking.done()):
            self._asking = self._event_loop.create_task(self._ask())

    async def _ask(self) -> None:
        """Poll all replicas until no request waits and no replica counts as full after a refusal."""
        while self._balancer.must_hear:
            await asyncio.sleep(_ASK_SECONDS)
            await asyncio.gather(*(self._hear(replica) for replica in self._replicas_list))

    async def _hear(self, replica: RunningReplica) -> None:
        try:
            asked = replica.get_queue_len(deadline_s=_ANSWER_SECONDS)
            self._balancer.hear(replica.replica_id, await asyncio.wait_for(asked, _ANSWER_SECONDS))
        except ActorDiedError:
            self.on_replica_actor_died(replica.replica_id)
        except (RayError, TimeoutError):
            return
        self._dispatch()

    # --- called by Serve

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._update_balancer()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._update_balancer()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._balancer.refuse(replica_id)
        self._keep_asking()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = _request(pending_request)
        if request is None:
            return
        reason = self._balancer.confirm(request, replica_id, pending_request.metadata.session_id)
        self._routed.inc(1, {"by": reason})
        # Not Serve's callback on_request_completed: its id is the same for all prompts of an HTTP request.
        ended = partial(self._event_loop.call_soon_threadsafe, self._end, request.request_id)
        result.add_done_callback(lambda _: ended())

    def _end(self, request_id: str) -> None:
        self._balancer.done(request_id)
        self._dispatch()

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: Any = None
    ) -> PendingRequest | None:
        """The request that a replica was chosen for, by its metadata object: all prompts of an HTTP request share Serve's id."""
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _update_balancer(self) -> None:
        self._balancer.update(
            {
                replica_id: (capacity, replica.routing_stats)
                for replica_id, replica in self._replicas.items()
                if (capacity := Capacity.read(replica.replica_metadata or {})) is not None
            }
        )
        self._dispatch()


def _request(pending: PendingRequest) -> Request | None:
    """The generation request that a call carries. None for other calls, such as `stats`, which may go to any replica."""
    return pending.args[0] if pending.args and isinstance(pending.args[0], Request) else None
