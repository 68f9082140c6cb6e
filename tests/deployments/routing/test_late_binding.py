"""A waiting request goes to the first replica with room: routers and replicas in simulated time."""

import heapq
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.requests.request import Request, SamplingParams
from tests.deployments.routing.simulated import (
    CAPACITY,
    report,
)


class Timeline:
    """Routers and replicas in simulated time. Messages take time, reports come late, and full replicas refuse requests."""

    SLOTS = 12

    def __init__(self, routers: int, replicas: int) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.capacity = CAPACITY._replace(max_num_seqs=self.SLOTS, pages=4096)
        self.replicas: dict[str, list[str]] = {f"replica-{i}": [] for i in range(replicas)}
        self.routers = [PrefixBalancer(clock=lambda: self.now, rng=random.Random(i)) for i in range(routers)]
        self.requests: dict[str, tuple[Request, float, PrefixBalancer]] = {}
        self.ended = self.refusals = 0
        self.idle, self._idle_since = 0.0, -1.0
        for router in self.routers:
            router.update(dict.fromkeys(self.replicas, (self.capacity, report())))
        self.every(1.0, self.publish)
        self.every(0.25, self.ask)

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, action))

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.at(seconds, again)

        self.at(seconds, again)

    def publish(self) -> None:
        """Send reports of the replicas as they are now. They arrive 0.7 s later."""
        reports = {name: (self.capacity, report(running)) for name, running in self.replicas.items()}
        for router in self.routers:
            self.at(0.7, partial(self.hear_reports, router, reports))

    def hear_reports(self, router: PrefixBalancer, reports: dict[str, Any]) -> None:
        router.update(reports)
        self.dispatch(router)

    def ask(self) -> None:
        for router in self.routers:
            if router.waiting:
                for name, running in self.replicas.items():
                    router.hear(name, len(running))
                self.dispatch(router)

    def arrive(self, router: PrefixBalancer, request: Request, seconds: float) -> None:
        self.requests[request.request_id] = request, seconds, router
        router.add(request)
        self.dispatch(router)

    def dispatch(self, router: PrefixBalancer) -> None:
        for request_id, name in router.dispatch():
            self.at(0.005, partial(self.receive, request_id, name))

    def receive(self, request_id: str, name: str) -> None:
        request, seconds, router = self.requests[request_id]
        if len(self.replicas[name]) >= self.SLOTS:
            self.refusals += 1
            router.add(request)
            self.dispatch(router)
            return
        self.replicas[name].append(request_id)
        router.confirm(request, name)
        self.at(seconds, lambda: self.end(request_id, name))

    def end(self, request_id: str, name: str) -> None:
        router = self.requests[request_id][2]
        self.replicas[name].remove(request_id)
        self.ended += 1
        router.done(request_id)
        self.dispatch(router)

    def run(self, requests: int) -> None:
        """Run until so many requests have ended. Sets `idle`: the longest time that a slot was free while requests waited."""
        while self.ended < requests:
            self.now, _, action = heapq.heappop(self._events)
            action()
            waiting = any(router.waiting for router in self.routers)
            if waiting and any(len(running) < self.SLOTS for running in self.replicas.values()):
                self._idle_since = self.now if self._idle_since < 0 else self._idle_since
                self.idle = max(self.idle, self.now - self._idle_since)
            else:
                self._idle_since = -1.0
            assert self.now < 600, "requests wait for ever"


@pytest.mark.parametrize("routers", [1, 2, 3])
@pytest.mark.parametrize("equal", [True, False])
def test_no_slot_is_free_while_requests_wait(routers: int, equal: bool) -> None:
    """32 requests at once on two replicas of 12 slots, and another 32 in the midst of them, over 1 to 3 routers."""
    rng = random.Random(routers)
    timeline = Timeline(routers, replicas=2)

    def burst(first: int) -> None:
        for number in range(first, first + 32):
            prompt = [1] * 100 if equal else [rng.randrange(100) for _ in range(rng.randrange(5, 400))]
            seconds = 10.0 if equal else rng.uniform(0.1, 12)
            request = Request(f"{number}", prompt, SamplingParams(max_tokens=400))
            timeline.arrive(timeline.routers[number % routers], request, seconds)

    timeline.at(2.9, lambda: burst(0))
    timeline.at(7.3, lambda: burst(32))
    timeline.run(64)
    if routers == 1:
        assert timeline.refusals == 0 and timeline.idle < 0.02
    else:
        assert timeline.idle < 0.5
    if equal:
        assert timeline.now < 2.9 + 31.5, "three waves of ten seconds"
