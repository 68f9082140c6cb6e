"""Chooses which replica gets a request, and when. It knows nothing of Ray Serve: deployments/router.py connects the two.

**Late binding.** A request waits in this queue until a replica has room for it. Room is a free slot (one of the engine's
`max_num_seqs` sequences) and KV pages for the prompt. So a request that is sent starts at once, and no slot of any replica is
idle while requests wait. A request of several choices needs one free slot. Its other choices wait in that engine for slots.

**What is known of a replica.** Its last report, which names the requests that it counts, and the requests that this router has
sent. The router adds its requests that the report does not name, and subtracts those that the report names but that have ended
since. So the age of a report doesn't matter. Of other routers' requests it knows only what reports and polls (`hear`) say, so it
may be wrong about room. Then the replica refuses (`max_ongoing_requests`), and the request gets its place in the queue back.

**Which replica.** Among the replicas with room, a request goes to the one whose cache holds the longest prefix of its prompt. If
there is none, it goes to the replica of its session. A replica with too much load is not chosen for these reasons. If neither
applies, the request goes to the less used of two random replicas.

**Which request.** Requests are served by priority, and then first come, first served, with two exceptions. Among requests of
the same priority, a freed slot goes to the one whose prompt has the longest cached prefix on that replica. And a prompt whose
pages fit nowhere lets others pass. A request that `_MOST_PASSED` others have passed gets the next slot, whatever is cached or
used there. No slot is kept free to wait for a prefix.
"""

import bisect
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from orthrus.cache.page_hash import PageHash, page_hashes
from orthrus.deployments.replica.reports import NAME_BYTES, Capacity, Load, RoutingReport, request_name
from orthrus.deployments.routing.load import request_load
from orthrus.requests.request import Request

Replica = Any
"""A hashable identifier of a replica, such as Serve's ReplicaID."""
_MAX_SENT_PAGES = 8192
_SENT_SECONDS = 30.0
"""How long a prompt counts as cached on the replica that it was sent to. After that, the replica's reports must show it."""
_UNCONFIRMED_SECONDS = 2.0
"""How long a dispatched request counts as load before Serve confirms it. It may have been cancelled."""
_REPORT_SECONDS = 10.0
"""How long an ended request is remembered. A report that arrives later than this after it was made may still count one."""
_MOST_PASSED = 8
"""How many later requests may get a slot before a waiting one."""
_LOOK_AHEAD = 16
"""How many requests, from the first in the queue, are considered for a free slot."""


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a slot."""

    arrival: int
    """Its number in the order of arrival."""
    request: Request
    session: str
    names: Sequence[PageHash]
    """Names of its prompt's pages."""
    passed: int = 0
    """How many later requests have got a slot before it."""

    @property
    def queue_key(self) -> tuple[int, int]:
        """What the queue is sorted by."""
        return self.request.priority, self.arrival


@dataclass(frozen=True)
class _Placement:
    """Which replica a request has, and why: see `PrefixBalancer.confirm`."""

    replica: Replica
    reason: str
    waited: _Waiting


class _ReplicaState:
    """What the router knows of one replica."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.refused = False
        self._report: Mapping[str, Any] = {}
        self._reported = Load()
        self._counted: frozenset[bytes] = frozenset()
        # This router's requests by name: those that the replica has, and those that have ended, with the time of the end.
        self._mine: dict[bytes, Load] = {}
        self._ended: dict[bytes, tuple[Load, float]] = {}
        # A correction of the report: this router's requests that it does not count, less ended ones that it counts.
        self._sent = Load()
        # A second correction: requests of other routers that the replica has now, less those that the report counts.
        self._others = 0
        self._held: frozenset[PageHash] = frozenset()
        self._sent_names: dict[PageHash, float] = {}

    @property
    def load(self) -> Load:
        return self._reported.plus(self._sent).plus(Load(sequences=self._others))

    @property
    def use(self) -> float:
        return self.load.use(self.capacity)

    @property
    def has_slot(self) -> bool:
        return not self.refused and self.load.sequences < self.capacity.max_num_seqs

    @property
    def requests(self) -> int:
        """How many of this router's requests it has."""
        return len(self._mine)

    def has_pages(self, waiting: _Waiting) -> bool:
        """Whether the replica has pages for the prompt. An empty replica takes any prompt, since it will never have more room."""
        load, cached = self.load, self.matching_pages(waiting.names)
        needed = len(waiting.request.prompt) / self.capacity.page_size - cached
        return load.sequences < 1 or load.pages + needed <= self.capacity.pages

    def report(self, report: Mapping[str, Any], now: float) -> None:
        """Apply a report, unless it is the one that is known already."""
        if not report or report == self._report:
            return
        self._report, self.refused, self._others = report, False, 0
        self._reported, self._counted, self._held = RoutingReport.read(report)
        self._sent = Load()
        for name, load in self._mine.items():
            if name not in self._counted:
                self._sent = self._sent.plus(load)
        for name, (load, _) in self._ended.items():
            if name in self._counted:
                self._sent = self._sent.plus(load, -1)
        self._sent_names = {n: at for n, at in self._sent_names.items() if now - at < _SENT_SECONDS}

    def hear(self, ongoing: int) -> None:
        """Note that the replica has `ongoing` requests now, from all routers."""
        self.refused = False
        counted = len(self._counted - self._mine.keys() - self._ended.keys())
        self._others = max(0, ongoing - len(self._mine)) - counted

    def add(self, name: bytes, load: Load) -> None:
        self._ended.pop(name, None)  # It may have been here before.
        self._mine[name] = load
        self._sent = self._sent.plus(load)

    def remove(self, name: bytes, now: float) -> None:
        load = self._mine.pop(name)
        while self._ended and now - next(iter(self._ended.values()))[1] > _REPORT_SECONDS:
            del self._ended[next(iter(self._ended))]
        self._ended[name] = load, now
        # This is right whether or not the report counts the request.
        self._sent = self._sent.plus(load, -1)

    def matching_pages(self, names: Sequence[PageHash]) -> int:
        """Pages of the longest cached prefix. A page's name identifies all pages before it too, and these outlive it."""
        for count in range(len(names), 0, -1):
            if names[count - 1] in self._held or names[count - 1] in self._sent_names:
                return count
        return 0

    def will_hold(self, names: Iterable[PageHash], now: float) -> None:
        """Count these pages as cached for `_SENT_SECONDS`."""
        for name in names:
            self._sent_names.pop(name, None)
            self._sent_names[name] = now
        while len(self._sent_names) > _MAX_SENT_PAGES:
            del self._sent_names[next(iter(self._sent_names))]


class PrefixBalancer:
    """The queue of one router, and what it knows of the replicas. See above.

    load_bound: a cached prefix or a session attracts requests to a replica while its use is at most this multiple of the mean.
    affinity_floor: up to this use it always does, because balance does not matter yet. Use is `Load.use`. clock (in seconds),
    rng: for tests. Raises ValueError for a setting out of range.
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
        self._replicas: dict[Replica, _ReplicaState] = {}
        self._queue: list[_Waiting] = []
        self._arrivals = 0
        # By request id.
        self._placed: dict[str, _Placement] = {}
        # Requests that Serve has not confirmed: when they were dispatched, by id, oldest first.
        self._unconfirmed: dict[str, float] = {}

    @property
    def has_replicas(self) -> bool:
        return bool(self._replicas)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def must_hear(self) -> bool:
        """Whether requests wait for what a replica may say, or one counts as full until it says something."""
        return bool(self._queue) or any(state.refused for state in self._replicas.values())

    def use(self, replica: Replica) -> float:
        """The share of a replica's capacity that is used (`Load.use`), as far as this router knows."""
        return self._replicas[replica].use

    def requests(self, replica: Replica) -> int:
        """How many of this router's requests a replica has."""
        return self._replicas[replica].requests

    # --- what happens to replicas

    def update(self, replicas: Mapping[Replica, tuple[Capacity, Mapping[str, Any]]]) -> None:
        """Set the replicas: for each, its capacity and its last report (see `RoutingReport.of`)."""
        self._replicas = {
            replica: self._replicas.get(replica) or _ReplicaState(capacity)
            for replica, (capacity, _) in replicas.items()
        }
        for replica, (_, report) in replicas.items():
            self._replicas[replica].report(report, self._clock())
        for request_id in [name for name, p in self._placed.items() if p.replica not in self._replicas]:
            self._take_back(request_id)

    def hear(self, replica: Replica, ongoing: int) -> None:
        """Note how many requests a replica has now, from all routers."""
        if replica in self._replicas:
            self._replicas[replica].hear(ongoing)

    def refuse(self, replica: Replica) -> None:
        """Note that a replica has refused a request. It counts as full until its next report or answer to a poll."""
        if replica in self._replicas:
            self._replicas[replica].refused = True

    # --- what happens to requests

    def add(self, request: Request, session: str = "") -> None:
        """Queue a request; `dispatch` gives it a replica. There must be replicas. session: "" for none.

        A request that has a replica already was refused there. It gets its place in the queue back.
        """
        before = self._placed.get(request.request_id)
        if before is not None:
            self._take_back(request.request_id)
            self.refuse(before.replica)
        waiting = self._make_waiting(request, session) if before is None else before.waited
        bisect.insort(self._queue, waiting, key=_queue_key)

    def dispatch(self) -> list[tuple[str, Replica]]:
        """Assign replicas to waiting requests as far as there is room. Returns request ids, each with its replica."""
        self._expire()
        placed = []
        while (found := self._next()) is not None:
            waiting, replica = found
            self._queue.remove(waiting)
            self._place(waiting, replica)
            self._unconfirmed[waiting.request.request_id] = self._clock()
            placed.append((waiting.request.request_id, replica))
        return placed

    def confirm(self, request: Request, replica: Replica, session: str = "") -> str:
        """Note that `replica` has accepted the request.

        Returns why that replica was chosen: "prefix" (one of the prompt is cached there), "session" or "load".
        """
        self._unconfirmed.pop(request.request_id, None)
        placement = self._placed.get(request.request_id)
        if placement is None and replica in self._replicas:  # It took longer than _UNCONFIRMED_SECONDS.
            placement = self._place(self._make_waiting(request, session), replica)
        return "load" if placement is None else placement.reason

    def done(self, request_id: str) -> None:
        """Forget a request that has ended or was cancelled. Unknown ids are ignored."""
        self._take_back(request_id)
        self._queue = [waiting for waiting in self._queue if waiting.request.request_id != request_id]

    # --- internals

    def _take_back(self, request_id: str) -> None:
        """Remove a request from its replica's load, if it has a replica."""
        self._unconfirmed.pop(request_id, None)
        placement = self._placed.pop(request_id, None)
        if placement is not None and placement.replica in self._replicas:
            self._replicas[placement.replica].remove(request_name(request_id), self._clock())

    def _make_waiting(self, request: Request, session: str) -> _Waiting:
        page_size = next(iter(self._replicas.values())).capacity.page_size
        # The last token is always computed, so a page that it completes is never taken from the cache.
        # A prompt that is scored takes no page from there.
        reused = request.prompt[:-1] if request.params.prompt_logprobs is None else ()
        hashes = page_hashes(reused, page_size, salt=request.cache_salt)
        names = [page_hash[:NAME_BYTES] for page_hash in hashes]
        self._arrivals += 1
        return _Waiting(self._arrivals, request, session, names)

    def _next(self) -> tuple[_Waiting, Replica] | None:
        """The request that gets a replica next, and that replica; None if no request can have one."""
        rooms = [replica for replica, state in self._replicas.items() if state.has_slot]
        if not rooms:
            return None
        window = self._queue[:_LOOK_AHEAD]
        for place, waiting in enumerate(window):
            fitting = [replica for replica in rooms if self._fits(waiting, replica)]
            if not fitting:
                continue
            replica = self._best(waiting, fitting)
            chosen = place if waiting.passed >= _MOST_PASSED else self._most_cached(window, place, replica)
            for passed in window[:chosen]:
                passed.passed += 1
            return window[chosen], replica
        return None

    def _fits(self, waiting: _Waiting, replica: Replica) -> bool:
        return waiting.passed >= _MOST_PASSED or self._replicas[replica].has_pages(waiting)

    def _most_cached(self, window: Sequence[_Waiting], first: int, replica: Replica) -> int:
        """The index in `window`, from `first` on, of the request with the longest cached prefix on the replica.

        Only requests of the same priority that fit there are considered. Ties go to the first.
        """
        if first == len(window) - 1:
            return first
        state = self._replicas[replica]
        priority = window[first].request.priority
        later = (i for i in range(first + 1, len(window)) if window[i].request.priority == priority)
        places = [first, *(i for i in later if state.has_pages(window[i]))]
        return max(places, key=lambda place: state.matching_pages(window[place].names))

    def _best(self, waiting: _Waiting, replicas: Sequence[Replica]) -> Replica:
        """The best of `replicas` for a request."""
        # Use without this request, so that an idle replica takes even the largest one.
        use = {replica: state.use for replica, state in self._replicas.items()}
        bound = max(self._affinity_floor, self._load_bound * sum(use.values()) / len(use))
        preferred = self._home(waiting.session)
        pair = self._rng.sample(list(replicas), min(2, len(replicas)))

        def rank(replica: Replica) -> tuple[int, bool, bool, float]:
            near = use[replica] <= bound
            pages = self._replicas[replica].matching_pages(waiting.names) if near else 0
            return -pages, not (near and replica == preferred), replica not in pair, use[replica]

        return min(replicas, key=rank)

    def _home(self, session: str) -> Replica | None:
        """The replica that a session prefers."""
        return max(self._replicas, key=lambda replica: _weight(session, replica)) if session else None

    def _place(self, waiting: _Waiting, replica: Replica) -> _Placement:
        state, request = self._replicas[replica], waiting.request
        cached = state.matching_pages(waiting.names)
        home = replica == self._home(waiting.session)
        placement = _Placement(replica, "prefix" if cached else "session" if home else "load", waiting)
        self._placed[request.request_id] = placement
        state.add(request_name(request.request_id), request_load(request, state.capacity, cached))
        state.will_hold(waiting.names, self._clock())
        return placement

    def _expire(self) -> None:
        horizon = self._clock() - _UNCONFIRMED_SECONDS
        while self._unconfirmed:
            request_id, at = next(iter(self._unconfirmed.items()))
            if at > horizon:
                return
            self._take_back(request_id)


_queue_key = attrgetter("queue_key")


def _weight(session: str, replica: Replica) -> bytes:
    """Rendezvous hashing: all routers choose the same replica, and adding or removing one moves no other replica's sessions."""
    return hashlib.blake2b(f"{session}\0{replica}".encode(), digest_size=8).digest()
