"""Simulated replicas with real page pools, for tests of the balancer."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

from orthrus.cache.page_hash import page_hashes
from orthrus.cache.page_pool import PagePool
from orthrus.deployments.replica.reports import NAME_BYTES, Capacity, Load, request_name
from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.requests.request import Request, SamplingParams

CAPACITY = Capacity(max_num_seqs=16, prefill_chunk=256, page_size=16, pages=512)


class Replica:
    """A page pool and the requests that hold its pages, as in the engine, but without a model."""

    def __init__(self) -> None:
        self.pool = PagePool(CAPACITY.pages + 1)
        self.running: dict[str, list[int]] = {}
        self.hit_pages = 0

    def start(self, request: Request) -> None:
        hashes = page_hashes(request.prompt[:-1], CAPACITY.page_size)
        pages = self.pool.match(hashes)
        self.hit_pages += len(pages)
        fresh = self.pool.allocate(len(hashes) - len(pages))
        assert fresh is not None
        for page, name in zip(fresh, hashes[len(pages) :], strict=True):
            self.pool.name(page, name)
        self.running[request.request_id] = pages + fresh

    def finish(self, request_id: str) -> None:
        self.pool.release(self.running.pop(request_id))

    def report(self) -> dict[str, object]:
        return report(self.running, pages=self.pool.used, prefixes=self.pool.recent(2048))


def report(
    requests: Iterable[str] = (),
    pages: float = 0,
    prefixes: Iterable[bytes] = (),
    sequences: float | None = None,
) -> dict[str, Any]:
    """The report of a replica with these requests and prefixes. sequences: by default, one for each request."""
    names = [request_name(request_id) for request_id in requests]
    load = Load(len(names) if sequences is None else sequences, 0, pages)
    return {
        **load._asdict(),
        "requests": b"".join(names),
        "prefixes": b"".join(name[:NAME_BYTES] for name in prefixes),
    }


def place(balancer: PrefixBalancer, request: Request, session: str = "") -> str:
    """Queue and dispatch a request. There must be room for it. Returns its replica."""
    balancer.add(request, session)
    [(request_id, replica)] = balancer.dispatch()
    assert request_id == request.request_id
    return str(replica)


class Cluster:
    """Several balancers over several replicas. Replicas report every `report_every` requests. Each request advances time."""

    def __init__(self, replicas: int, *, routers: int = 1, report_every: int = 16) -> None:
        self.now = 0.0
        self.replicas = {f"replica-{i}": Replica() for i in range(replicas)}
        self.routers = [PrefixBalancer(clock=lambda: self.now, rng=random.Random(i)) for i in range(routers)]
        self.report_every = report_every
        self.running: list[tuple[PrefixBalancer, str, str]] = []
        self.served: Counter[str] = Counter()
        self.total_pages = 0
        self.publish()

    def publish(self) -> None:
        for router in self.routers:
            router.update({name: (CAPACITY, r.report()) for name, r in self.replicas.items()})

    def run(self, prompts: Iterable[list[int]], concurrent: int) -> None:
        """Send the prompts in order, with `concurrent` of them in flight. The oldest one ends when another comes."""
        for number, prompt in enumerate(prompts):
            self.now += 0.05
            if number % self.report_every == 0:
                self.publish()
            if len(self.running) == concurrent:
                router, name, request_id = self.running.pop(0)
                self.replicas[name].finish(request_id)
                router.done(request_id)
            router = self.routers[number % len(self.routers)]
            request = Request(f"{id(self)}-{number}", prompt, SamplingParams(max_tokens=64))
            name = place(router, request)
            router.confirm(request, name)
            self.replicas[name].start(request)
            self.running.append((router, name, request.request_id))
            self.served[name] += 1
            self.total_pages += (len(prompt) - 1) // CAPACITY.page_size

    @property
    def hit_rate(self) -> float:
        return sum(r.hit_pages for r in self.replicas.values()) / self.total_pages


def shared_prefix_traffic(prefixes: int, requests: int, seed: int = 0) -> list[list[int]]:
    """Prompts of a long prefix, one of `prefixes`, and a question of its own."""
    rng = random.Random(seed)
    heads = [[rng.randrange(1000) for _ in range(320)] for _ in range(prefixes)]
    return [[*rng.choice(heads), *(rng.randrange(1000) for _ in range(40))] for _ in range(requests)]
