"""Where requests go: the balancer over simulated replicas with real page pools, on a clock of its own."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from deployments.router import NAME_BYTES, Capacity, Load, PrefixBalancer
from orthrus.kv_cache import PagePool
from orthrus.page_hash import page_hashes
from orthrus.request import Request, SamplingParams

CAPACITY = Capacity(max_num_seqs=16, prefill_chunk=256, page_size=16, pages=512)


class Replica:
    """A cache and the requests that hold its pages: what the engine does with them, without a model."""

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
        names = b"".join(name[:NAME_BYTES] for name in self.pool.recent(2048))
        return {**Load(len(self.running), self.pool.used)._asdict(), "prefixes": names}


class Cluster:
    """`routers` balancers over `replicas`, with reports every `report_every` requests; time moves with each request."""

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
        """Send the prompts in order, `concurrent` of them in flight; the oldest one ends when another comes."""
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
            name, *_ = router.rank(request)
            router.confirm(request.request_id, name)
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


@pytest.mark.parametrize("routers", [1, 2])
def test_shared_prefixes_hit_as_often_as_on_one_replica(routers: int) -> None:
    prompts = shared_prefix_traffic(12, 1200)
    alone = Cluster(1)
    alone.run(prompts, concurrent=4)
    three = Cluster(3, routers=routers)
    three.run(prompts, concurrent=12)
    assert alone.hit_rate > 0.8
    assert three.hit_rate >= 0.9 * alone.hit_rate
    assert max(three.served.values()) <= 1.5 * 400, three.served


def test_one_hot_prefix_is_shared_out() -> None:
    prompts = shared_prefix_traffic(1, 900)
    cluster = Cluster(3)
    cluster.run(prompts, concurrent=24)
    assert max(cluster.served.values()) <= 1.5 * 300, cluster.served
    assert cluster.hit_rate > 0.8


def test_a_lone_conversation_stays_where_its_prefix_is() -> None:
    cluster = Cluster(3)
    conversation = list(range(600))
    cluster.run([conversation[:length] for length in range(100, 600, 60)], concurrent=1)
    assert len(cluster.served) == 1


def test_load_counts_rows_and_pages_not_requests() -> None:
    balancer = PrefixBalancer(affinity_floor=0.0, rng=random.Random(0))
    report = {"rows": 0.0, "pages": 0.0, "prefixes": b""}
    balancer.update({"a": (CAPACITY, report), "b": (CAPACITY, report)})
    long = Request("long", list(range(4000)), SamplingParams(max_tokens=64))
    home, *_ = balancer.rank(long)
    balancer.confirm("long", home)
    short = [Request(f"short-{i}", [i] * 20, SamplingParams(max_tokens=16)) for i in range(6)]
    for request in short:
        replica, *_ = balancer.rank(request)
        balancer.confirm(request.request_id, replica)
        assert replica != home, "six short requests weigh less than one long prompt"
    for request in (long, *short):
        balancer.done(request.request_id)
    assert balancer.use("a") == balancer.use("b") == 0.0


def test_reports_replace_what_the_router_assumed() -> None:
    balancer = PrefixBalancer()
    empty = {"rows": 0.0, "pages": 0.0, "prefixes": b""}
    balancer.update({"a": (CAPACITY, empty), "b": (CAPACITY, empty)})
    request = Request("r", [1] * 100, SamplingParams(max_tokens=16))
    home, other = balancer.rank(request)
    balancer.confirm("r", home)
    # Another router's requests are in the report only; ours is in both, and counts once.
    busy = {"rows": 8.0, "pages": 100.0, "prefixes": b""}
    balancer.update({home: (CAPACITY, busy), other: (CAPACITY, empty)})
    assert balancer.use(home) == 0.5
    balancer.done("r")
    assert 0.4 < balancer.use(home) < 0.5


def test_a_dead_replica_is_never_ranked_and_a_choice_that_came_to_nothing_is_forgotten() -> None:
    now = 0.0
    balancer = PrefixBalancer(clock=lambda: now)
    empty = {"rows": 0.0, "pages": 0.0, "prefixes": b""}
    replicas = dict.fromkeys("abc", (CAPACITY, empty))
    balancer.update(replicas)
    request = Request("r", [1] * 100, SamplingParams(max_tokens=16))
    ranked = balancer.rank(request)
    assert sorted(ranked) == ["a", "b", "c"]
    home = ranked[0]
    assert balancer.use(home) > 0
    now = 3.0
    balancer.rank(Request("s", [2] * 100, SamplingParams(max_tokens=16)))
    balancer.done("s")
    assert balancer.use(home) == 0.0, "never confirmed"
    assert balancer.confirm("r", home) == "load"
    del replicas[home]
    balancer.update(replicas)
    assert home not in balancer.rank(request)
    balancer.done("r")
    balancer.update({})
    assert balancer.rank(request) == []


def test_a_session_stays_with_its_replica_for_every_router_as_far_as_load_allows() -> None:
    empty = {"rows": 0.0, "pages": 0.0, "prefixes": b""}
    replicas = dict.fromkeys("abc", (CAPACITY, empty))
    routers = [PrefixBalancer(rng=random.Random(i)) for i in range(2)]
    for router in routers:
        router.update(replicas)

    def home(session: str, number: int, router: PrefixBalancer) -> str:
        request = Request(f"{session}-{number}", [number] * 5, SamplingParams(max_tokens=1))
        replica = str(router.rank(request, session)[0])
        assert router.confirm(request.request_id, replica) == "session"
        router.done(request.request_id)
        return replica

    homes = {f"s{i}": {home(f"s{i}", n, router) for n, router in enumerate(routers * 3)} for i in range(60)}
    assert all(len(found) == 1 for found in homes.values())
    chosen = Counter(found.pop() for found in homes.values())
    assert set(chosen) == set("abc") and max(chosen.values()) < 40
    # A replica that goes moves its own sessions only.
    [first] = {home("s0", 100, routers[0])}
    gone = next(name for name in "abc" if name != first)
    routers[0].update({name: known for name, known in replicas.items() if name != gone})
    assert home("s0", 101, routers[0]) == first
    # Too much to do at home: elsewhere. A cached prefix elsewhere counts for more, too.
    busy = {"rows": 12.0, "pages": 300.0, "prefixes": b""}
    routers[1].update({**replicas, first: (CAPACITY, busy)})
    assert routers[1].rank(Request("x", [1] * 5), "s0")[0] != first
    prompt = list(range(100))
    names = b"".join(name[:NAME_BYTES] for name in page_hashes(prompt, CAPACITY.page_size))
    routers[1].update({**replicas, gone: (CAPACITY, {"rows": 0.0, "pages": 6.0, "prefixes": names})})
    assert routers[1].rank(Request("y", prompt), "s0")[0] == gone
    assert routers[1].confirm("y", gone) == "prefix"


@pytest.mark.parametrize("kwargs", [{"load_bound": 0.5}, {"affinity_floor": -0.1}, {"affinity_floor": 1.1}])
def test_settings_out_of_range_are_named(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PrefixBalancer(**kwargs)
