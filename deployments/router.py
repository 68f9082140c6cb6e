"""Which replica gets a request: the one whose cache holds most of its prompt, unless that one has too much to do.

Of those that hold equally much, a session's own replica comes first. Clients may name a session, in the header (over gRPC, the
metadata) `x-session-id` or as `prompt_cache_key`, and every ingress then prefers the same replica for it.

Replicas tell what they can hold (`replica_capacity`, once), and how loaded they are and which prefixes they hold
(`replica_report`, every `request_routing_stats_period_s`). `PrefixBalancer` decides from that and from what this router
has sent since; `PrefixRouter` ties it to Serve. Serve pickles this module to every process that routes.
"""

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util.metrics import Counter

from orthrus.page_hash import PageHash, page_hashes
from orthrus.request import Request

if TYPE_CHECKING:
    from orthrus.engine import Engine

Replica = Any
"""Whatever names a replica, hashable: Serve's ReplicaID."""
NAME_BYTES = 8
"""Of a page's hash, enough for routing: a collision costs one wrong preference."""
MAX_REPORTED_PAGES = 2048
_MAX_SENT_PAGES = 8192
_SENT_SECONDS = 30.0
"""How long a prompt counts as cached where it was sent before the replica's reports must show it."""
_UNCONFIRMED_SECONDS = 2.0
"""How long a choice counts as load until Serve says that the request was taken; it may have been cancelled."""
_TYPICAL_OUTPUT_TOKENS = 256
"""Most answers end long before their limit; reports correct what this gets wrong."""


class Capacity(NamedTuple):
    """What one replica can hold. Row and page budgets are those of `EngineConfig`."""

    max_num_seqs: int
    prefill_chunk: int
    page_size: int
    pages: int


class Load(NamedTuple):
    """Work on a replica. rows: one a decoding sequence, and one for every `prefill_chunk` of prompt rows to compute."""

    rows: float = 0.0
    pages: float = 0.0

    def plus(self, other: "Load", sign: int = 1) -> "Load":
        return Load(self.rows + sign * other.rows, self.pages + sign * other.pages)

    def use(self, capacity: Capacity) -> float:
        """Part of the capacity taken, of that resource of which most is taken; over 1 when requests queue."""
        return max(0.0, self.rows / capacity.max_num_seqs, self.pages / capacity.pages)


def replica_capacity(engine: "Engine") -> dict[str, int]:
    """`Capacity` as a replica publishes it when it is ready."""
    config = engine.config
    return Capacity(
        config.max_num_seqs, config.prefill_chunk, engine.page_size, engine.stats.kv_pages_total
    )._asdict()


def replica_report(engine: "Engine") -> dict[str, Any]:
    """A replica's `Load`, and names of the pages that its cache holds, those used last."""
    stats = engine.stats
    load = Load(
        stats.running + stats.waiting + stats.rows_to_prefill / engine.config.prefill_chunk,
        stats.kv_pages_used,
    )
    recent = engine.recent_prefixes(MAX_REPORTED_PAGES)
    return {**load._asdict(), "prefixes": b"".join(name[:NAME_BYTES] for name in recent)}


def request_load(request: Request, capacity: Capacity) -> Load:
    """What a request will take of a replica that has nothing of it cached."""
    params, prompt = request.params, len(request.prompt)
    most = params.max_tokens
    output = _TYPICAL_OUTPUT_TOKENS if most is None else min(most, _TYPICAL_OUTPUT_TOKENS)
    return Load(params.n + prompt / capacity.prefill_chunk, (prompt + params.n * output) / capacity.page_size)


class _Placement(NamedTuple):
    """Where a request is counted. names: of the pages of its prompt. home: its session's replica, None without one."""

    replica: Replica
    load: Load
    names: Sequence[PageHash]
    home: Replica | None


class _View:
    """What is known of one replica: its last report, and what this router has sent it since."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.sent = Load()
        self._report: Mapping[str, Any] = {}
        self._reported = self._sent_at_report = Load()
        self._held: frozenset[PageHash] = frozenset()
        self._sent_names: dict[PageHash, float] = {}

    def report(self, report: Mapping[str, Any], now: float) -> None:
        if not report or report == self._report:
            return
        self._report = report
        self._reported = Load(report["rows"], report["pages"])
        # Requests of this router in flight now are in the report already; those of other routers only there.
        self._sent_at_report = self.sent
        names = report["prefixes"]
        self._held = frozenset(names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES))
        self._sent_names = {n: at for n, at in self._sent_names.items() if now - at < _SENT_SECONDS}

    @property
    def load(self) -> Load:
        return self._reported.plus(self.sent).plus(self._sent_at_report, -1)

    def matching_pages(self, names: Sequence[PageHash]) -> int:
        """Pages of the longest prefix held. A page's name stands for all before it, which outlive it in the cache."""
        for count in range(len(names), 0, -1):
            if names[count - 1] in self._held or names[count - 1] in self._sent_names:
                return count
        return 0

    def will_hold(self, names: Iterable[PageHash], now: float) -> None:
        for name in names:
            self._sent_names.pop(name, None)
            self._sent_names[name] = now
        while len(self._sent_names) > _MAX_SENT_PAGES:
            del self._sent_names[next(iter(self._sent_names))]


class PrefixBalancer:
    """Ranks replicas for a request: longest cached prefix first, then its session's replica, as far as the load allows; then
    power of two choices.

    load_bound: a replica is given requests for its cache's or a session's sake while its use stays below this multiple of
    the mean. affinity_floor: or below this use, where balance does not matter yet. Both are about use as in `Load.use`.
    clock, rng: for tests.
    """

    def __init__(
        self,
        load_bound: float = 1.25,
        affinity_floor: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if load_bound < 1:
            raise ValueError(f"load_bound must be at least 1, got {load_bound}")
        if not 0 <= affinity_floor <= 1:
            raise ValueError(f"affinity_floor must be between 0 and 1, got {affinity_floor}")
        self._load_bound, self._affinity_floor = load_bound, affinity_floor
        self._clock, self._rng = clock, rng or random.Random()
        self._views: dict[Replica, _View] = {}
        self._placed: dict[str, _Placement] = {}
        # Request ids of choices that Serve has not confirmed, oldest first.
        self._unconfirmed: dict[str, float] = {}

    def update(self, replicas: Mapping[Replica, tuple[Capacity, Mapping[str, Any]]]) -> None:
        """Take over the set of replicas with what they published and last reported."""
        self._views = {
            replica: self._views.get(replica) or _View(capacity)
            for replica, (capacity, _) in replicas.items()
        }
        for replica, (_, report) in replicas.items():
            self._views[replica].report(report, self._clock())
        self._placed = {name: p for name, p in self._placed.items() if p.replica in self._views}

    def use(self, replica: Replica) -> float:
        """Part of a replica's capacity that is taken, as far as this router knows."""
        view = self._views[replica]
        return view.load.use(view.capacity)

    def rank(self, request: Request, session: str = "") -> list[Replica]:
        """All replicas, best first. The first is charged. session: "" for none."""
        self._expire()
        before = self._placed.get(request.request_id)
        self.done(request.request_id)
        if not self._views:
            return []
        capacity = next(iter(self._views.values())).capacity
        if before is not None:
            names = before.names
        else:
            # The newest token is computed in any case, so its page is never taken from the cache.
            hashes = page_hashes(request.prompt[:-1], capacity.page_size, salt=request.cache_salt)
            names = [page_hash[:NAME_BYTES] for page_hash in hashes]
        load = request_load(request, capacity)
        # Before this request: a replica with nothing to do takes the largest.
        use = {replica: self.use(replica) for replica in self._views}
        bound = max(self._affinity_floor, self._load_bound * sum(use.values()) / len(use))
        pages = {r: view.matching_pages(names) if use[r] <= bound else 0 for r, view in self._views.items()}
        home = max(self._views, key=lambda r: _weight(session, r)) if session else None
        preferred = home if home is not None and use[home] <= bound else None
        pair = self._rng.sample(list(self._views), min(2, len(self._views)))
        ranked = sorted(self._views, key=lambda r: (-pages[r], r != preferred, r not in pair, use[r]))
        self._place(request.request_id, _Placement(ranked[0], load, names, home))
        self._unconfirmed[request.request_id] = self._clock()
        return ranked

    def confirm(self, request_id: str, replica: Replica) -> str:
        """Serve has sent the request to `replica`, which need not be the one ranked first.

        What speaks for that replica: a "prefix" that it holds, that it is the "session"'s, or "load" alone.
        """
        self._unconfirmed.pop(request_id, None)
        placement = self._placed.get(request_id)
        if placement is None or replica not in self._views:
            return "load"
        self.done(request_id)
        self._place(request_id, placement._replace(replica=replica))
        view = self._views[replica]
        held = view.matching_pages(placement.names)
        view.will_hold(placement.names, self._clock())
        return "prefix" if held else "session" if replica == placement.home else "load"

    def done(self, request_id: str) -> None:
        """The request has ended, whatever its end; unknown ones are ignored."""
        self._unconfirmed.pop(request_id, None)
        placement = self._placed.pop(request_id, None)
        if placement is not None and placement.replica in self._views:
            view = self._views[placement.replica]
            view.sent = view.sent.plus(placement.load, -1)

    def _place(self, request_id: str, placement: _Placement) -> None:
        self._placed[request_id] = placement
        view = self._views[placement.replica]
        view.sent = view.sent.plus(placement.load)

    def _expire(self) -> None:
        horizon = self._clock() - _UNCONFIRMED_SECONDS
        while self._unconfirmed:
            request_id, at = next(iter(self._unconfirmed.items()))
            if at > horizon:
                return
            self.done(request_id)


class PrefixRouter(FIFOMixin, RequestRouter):
    """Serve's side of `PrefixBalancer`, whose keywords are the YAML's `request_router_kwargs`."""

    def initialize_state(self, load_bound: float = 1.25, affinity_floor: float = 0.1) -> None:
        self._balancer = PrefixBalancer(load_bound, affinity_floor)
        # Serve tells the end of a request by an id that the calls for all prompts of one HTTP request share.
        self._sent: dict[tuple[ReplicaID, str], list[str]] = {}
        self._routed = Counter(
            "orthrus_routed_requests",
            "Requests by what spoke for their replica: a cached prefix, their session, or load alone",
            ("application", "deployment", "by"),
        ).set_default_tags({"application": self.app_name, "deployment": self._deployment_id.name})

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._update_balancer()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._update_balancer()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Without it Serve asks again at once while all replicas are full, and does nothing else.
        pending_request.routing_context.should_backoff = True
        request = _request(pending_request)
        if request is None:
            return [candidate_replicas]
        ranked = self._balancer.rank(request, pending_request.metadata.session_id)
        if not ranked:
            return [candidate_replicas]
        return [[self._replicas[replica]] for replica in ranked if replica in self._replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = _request(pending_request)
        if request is not None:
            key = (replica_id, pending_request.metadata.internal_request_id)
            self._sent.setdefault(key, []).append(request.request_id)
            self._routed.inc(1, {"by": self._balancer.confirm(request.request_id, replica_id)})

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        sent = self._sent.get((replica_id, internal_request_id))
        if sent:
            self._balancer.done(sent.pop())
            if not sent:
                del self._sent[replica_id, internal_request_id]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The very request that a replica was chosen for; FIFOMixin would give it to the one that came first."""
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _update_balancer(self) -> None:
        self._sent = {key: sent for key, sent in self._sent.items() if key[0] in self._replicas}
        self._balancer.update(
            {
                replica_id: (Capacity(**replica.replica_metadata), replica.routing_stats)
                for replica_id, replica in self._replicas.items()
                if replica.replica_metadata
            }
        )


def _weight(session: str, replica: Replica) -> bytes:
    """Rendezvous hashing: all routers agree, and a replica that comes or goes moves its own sessions only."""
    return hashlib.blake2b(f"{session}\0{replica}".encode(), digest_size=8).digest()


def _request(pending: PendingRequest) -> Request | None:
    """The generation request that a call carries; other calls (counters, say) may go anywhere."""
    return pending.args[0] if pending.args and isinstance(pending.args[0], Request) else None
