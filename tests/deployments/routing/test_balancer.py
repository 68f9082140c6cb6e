"""Where requests go and when: the balancer over simulated replicas with real page pools, on a clock of its own."""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from orthrus.cache.page_hash import page_hashes
from orthrus.cache.page_pool import PagePool
from orthrus.deployments.replica.reports import NAME_BYTES, Capacity, Load, request_name
from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.requests.request import Request, SamplingParams

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
        return report(self.running, pages=self.pool.used, prefixes=self.pool.recent(2048))


def report(
    requests: Iterable[str] = (),
    pages: float = 0,
    prefixes: Iterable[bytes] = (),
    sequences: float | None = None,
) -> dict[str, Any]:
    """What a replica reports that has these requests and prefixes. sequences: one a request where not given."""
    names = [request_name(request_id) for request_id in requests]
    load = Load(len(names) if sequences is None else sequences, 0, pages)
    return {
        **load._asdict(),
        "requests": b"".join(names),
        "prefixes": b"".join(name[:NAME_BYTES] for name in prefixes),
    }


def place(balancer: PrefixBalancer, request: Request, session: str = "") -> str:
    """Send a request to where there is room for it: there must be."""
    balancer.add(request, session)
    [(request_id, replica)] = balancer.dispatch()
    assert request_id == request.request_id
    return str(replica)


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
    balancer.update({"a": (CAPACITY, report()), "b": (CAPACITY, report())})
    long = Request("long", list(range(4000)), SamplingParams(max_tokens=64))
    home = place(balancer, long)
    short = [Request(f"short-{i}", [i] * 20, SamplingParams(max_tokens=16)) for i in range(6)]
    for request in short:
        assert place(balancer, request) != home, "six short requests weigh less than one long prompt"
    for request in (long, *short):
        balancer.done(request.request_id)
    assert balancer.use("a") == pytest.approx(0) and balancer.use("b") == pytest.approx(0)


def test_a_report_counts_for_the_requests_that_it_names_however_old_it_is() -> None:
    balancer = PrefixBalancer()
    balancer.update({"a": (CAPACITY, report())})
    ours = [Request(f"ours-{i}", [i] * 16, SamplingParams(max_tokens=16)) for i in range(8)]
    for request in ours:
        assert place(balancer, request) == "a"
    assert balancer.use("a") == pytest.approx((8 + 8 / 16) / 16)
    # Made when two of them had come, and four of another router.
    others = [f"theirs-{i}" for i in range(4)]
    balancer.update({"a": (CAPACITY, report(["ours-0", "ours-1", *others], pages=12))})
    assert balancer.use("a") == pytest.approx((12 + 6 / 16) / 16)
    # Two that it names and one that it doesn't have ended since.
    for request in ours[:3]:
        balancer.done(request.request_id)
    assert balancer.use("a") == pytest.approx((9 + 3 / 16) / 16)
    # A later one still names one of those, and the other router's have ended.
    balancer.update({"a": (CAPACITY, report(["ours-1", "ours-3"], pages=4))})
    assert balancer.use("a") == pytest.approx((5 + 3 / 16) / 16)


def test_the_queue_is_kept_until_there_is_room_and_then_in_order() -> None:
    """32 equal requests at once on two replicas of 12 slots. A report from before they came changes nothing."""
    balancer = PrefixBalancer()
    twelve = CAPACITY._replace(max_num_seqs=12)
    balancer.update(dict.fromkeys("ab", (twelve, report())))
    requests = [Request(f"{i}", [1] * 100, SamplingParams(max_tokens=400)) for i in range(32)]
    for request in requests:
        balancer.add(request)
    first = balancer.dispatch()
    assert [request_id for request_id, _ in first] == [f"{i}" for i in range(24)]
    assert Counter(replica for _, replica in first) == {"a": 12, "b": 12}
    balancer.update(dict.fromkeys("ab", (twelve, report(prefixes=[b"seen before"]))))
    assert balancer.dispatch() == [] and balancer.waiting == 8
    balancer.done("30")  # Its client has gone.
    where = dict(first)
    for ended, then in zip(("5", "17", "2"), ("24", "25", "26"), strict=True):
        balancer.done(ended)
        assert balancer.dispatch() == [(then, where[ended])]
    assert balancer.waiting == 4
    # A replica more takes the rest.
    balancer.update(dict.fromkeys("abc", (twelve, report(prefixes=[b"seen before"]))))
    assert balancer.dispatch() == [(f"{i}", "c") for i in (27, 28, 29, 31)]


def test_a_request_of_many_choices_needs_one_slot_and_keeps_others_out() -> None:
    balancer = PrefixBalancer()
    four = CAPACITY._replace(max_num_seqs=4)
    balancer.update({"a": (four, report())})
    many = Request("many", [1] * 20, SamplingParams(max_tokens=16, n=6))
    assert place(balancer, Request("one", [2] * 20, SamplingParams(max_tokens=16))) == "a"
    assert place(balancer, many) == "a"
    balancer.add(Request("later", [3] * 20, SamplingParams(max_tokens=16)))
    balancer.done("one")
    assert balancer.dispatch() == [], "six choices have four slots"
    # Three of them have ended.
    balancer.update({"a": (four, report(["many"], sequences=3))})
    assert balancer.dispatch() == [("later", "a")]


def test_a_prompt_whose_pages_fit_nowhere_waits_for_them_but_not_for_ever() -> None:
    balancer = PrefixBalancer()
    balancer.update({"a": (CAPACITY, report(["theirs"], pages=500))})
    large = Request("large", [1] * 800, SamplingParams(max_tokens=1))
    balancer.add(large)
    assert balancer.dispatch() == []
    for number in range(8):
        small = Request(f"small-{number}", [number] * 10, SamplingParams(max_tokens=1))
        balancer.add(small)
        now_too = [("large", "a")] if number == 7 else []  # It has let eight pass.
        assert balancer.dispatch() == [(small.request_id, "a"), *now_too]
        balancer.done(small.request_id)
    balancer.done("large")
    # Where nothing else is, there is no more room to wait for.
    balancer.update({"a": (CAPACITY, report(pages=500))})
    balancer.add(large)
    assert balancer.dispatch() == [("large", "a")]


def test_what_a_replica_holds_of_a_prompt_needs_no_pages() -> None:
    balancer = PrefixBalancer()
    prompt = list(range(800))
    held = report(["theirs"], pages=490, prefixes=page_hashes(prompt, CAPACITY.page_size))
    balancer.update({"a": (CAPACITY, held)})
    for number in range(4):
        assert place(balancer, Request(f"{number}", [*prompt, number], SamplingParams(max_tokens=16))) == "a"


def test_a_freed_slot_goes_to_whose_prefix_is_there_as_far_as_is_fair() -> None:
    balancer = PrefixBalancer()
    two = CAPACITY._replace(max_num_seqs=2)
    prompts = {"x": [1] * 200, "y": [2] * 200}
    held = {
        "a": report(prefixes=page_hashes(prompts["x"], CAPACITY.page_size)),
        "b": report(prefixes=page_hashes(prompts["y"], CAPACITY.page_size)),
    }
    balancer.update({name: (two, its) for name, its in held.items()})

    def ask(name: str, prefix: str) -> None:
        balancer.add(Request(name, prompts[prefix], SamplingParams(max_tokens=16)))

    for name, prefix in (("1", "x"), ("2", "x"), ("3", "y"), ("4", "y")):
        ask(name, prefix)
    assert dict(balancer.dispatch()) == {"1": "a", "2": "a", "3": "b", "4": "b"}
    ask("first", "x")
    ask("second", "y")
    balancer.done("3")
    assert balancer.dispatch() == [("second", "b")], "b holds y"
    balancer.done("1")
    assert balancer.dispatch() == [("first", "a")]
    # Eight may pass, no more.
    ask("late", "x")
    for number in range(9):
        ask(f"y-{number}", "y")
    running = "4"
    for number in range(8):
        balancer.done(running)
        running = f"y-{number}"
        assert balancer.dispatch() == [(running, "b")]
    balancer.done(running)
    assert balancer.dispatch() == [("late", "b")]


def test_the_more_important_come_first_and_salts_share_no_prefix() -> None:
    balancer = PrefixBalancer()
    one = CAPACITY._replace(max_num_seqs=1)
    prompt = [1] * 100
    held = report(prefixes=page_hashes(prompt, CAPACITY.page_size))
    balancer.update({"a": (one, held)})
    params = SamplingParams(max_tokens=16)
    salted = Request("salted", prompt, params, cache_salt="mine")
    assert place(balancer, salted) == "a" and balancer.confirm(salted, "a") == "load"
    # Of the two that matter less, one is cached; it gets the slot after the one that matters more, and before its equal.
    for name, tokens, priority in (("other", [2] * 100, 1), ("cached", prompt, 1), ("urgent", [3] * 100, -1)):
        balancer.add(Request(name, tokens, params, priority=priority))
    running = "salted"
    for expected in ("urgent", "cached", "other"):
        balancer.done(running)
        assert balancer.dispatch() == [(expected, "a")]
        running = expected


def test_who_is_refused_keeps_its_place_and_nothing_goes_there_until_it_is_heard_of() -> None:
    balancer = PrefixBalancer()
    two = CAPACITY._replace(max_num_seqs=2)
    balancer.update({"a": (two, report())})
    refused, also = (Request(name, [1] * 20, SamplingParams(max_tokens=16)) for name in ("refused", "also"))
    assert place(balancer, refused) == place(balancer, also) == "a"
    balancer.add(Request("later", [2] * 20, SamplingParams(max_tokens=16)))
    balancer.add(refused)
    balancer.add(also)
    # It was another router's requests that were in the way: so many of them run.
    assert balancer.dispatch() == []
    balancer.hear("a", 2)
    assert balancer.dispatch() == []
    balancer.hear("a", 1)
    assert balancer.dispatch() == [("refused", "a")]
    assert balancer.dispatch() == []
    balancer.hear("a", 1)  # Ours alone.
    assert balancer.dispatch() == [("also", "a")]
    balancer.done("refused")
    assert balancer.dispatch() == [("later", "a")]


def test_a_request_that_was_taken_back_and_sent_again_counts_once() -> None:
    capacity = CAPACITY._replace(max_num_seqs=2)
    now = [0.0]
    balancer = PrefixBalancer(clock=lambda: now[0])
    balancer.update({"a": (capacity, report())})
    first = Request("first", [1, 2, 3], SamplingParams(max_tokens=8))
    assert place(balancer, first) == "a"
    now[0] += 3
    assert balancer.dispatch() == [] and balancer.use("a") == pytest.approx(0), "never confirmed"
    balancer.confirm(first, "a")  # It was taken after all, late.
    balancer.update({"a": (capacity, report(["first"]))})
    for name in ("second", "third"):
        balancer.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=8)), "")
    assert [name for name, _ in balancer.dispatch()] == ["second"]


def test_a_dead_replica_gets_nothing_and_a_choice_that_came_to_nothing_is_forgotten() -> None:
    now = 0.0
    balancer = PrefixBalancer(clock=lambda: now)
    replicas = dict.fromkeys("abc", (CAPACITY, report()))
    balancer.update(replicas)
    request = Request("r", [1] * 100, SamplingParams(max_tokens=16))
    home = place(balancer, request)
    assert balancer.use(home) > 0
    now = 3.0
    place(balancer, Request("s", [2] * 100, SamplingParams(max_tokens=16)))
    balancer.done("s")
    assert balancer.use(home) == pytest.approx(0), "never confirmed"
    # It was taken after all, late.
    assert balancer.confirm(request, home) == "prefix"
    assert balancer.use(home) > 0
    del replicas[home]
    balancer.update(replicas)
    assert balancer.confirm(request, home) == "load"
    assert place(balancer, Request("t", [1] * 100, SamplingParams(max_tokens=16))) != home
    balancer.done("r")
    balancer.update({})
    assert not balancer.has_replicas and balancer.dispatch() == []


def test_a_request_whose_replica_has_died_before_it_took_it_waits_on() -> None:
    now = 0.0
    balancer = PrefixBalancer(clock=lambda: now)
    one = CAPACITY._replace(max_num_seqs=1)
    balancer.update({"a": (one, report())})
    request = Request("r", [1] * 100, SamplingParams(max_tokens=16))
    assert place(balancer, request) == "a"
    balancer.update({"b": (one, report(["theirs"]))})
    balancer.add(request)
    now = 3.0
    assert balancer.dispatch() == [] and balancer.waiting == 1
    balancer.update({"b": (one, report())})
    assert balancer.dispatch() == [("r", "b")]


def test_a_session_stays_with_its_replica_for_every_router_as_far_as_load_allows() -> None:
    replicas = dict.fromkeys("abc", (CAPACITY, report()))
    routers = [PrefixBalancer(rng=random.Random(i)) for i in range(2)]
    for router in routers:
        router.update(replicas)

    def home(session: str, number: int, router: PrefixBalancer) -> str:
        request = Request(f"{session}-{number}", [number] * 5, SamplingParams(max_tokens=1))
        replica = place(router, request, session)
        assert router.confirm(request, replica) == "session"
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
    busy = report([f"{i}" for i in range(12)], pages=300)
    routers[1].update({**replicas, first: (CAPACITY, busy)})
    assert place(routers[1], Request("x", [1] * 5), "s0") != first
    prompt = list(range(100))
    held = report(pages=6, prefixes=page_hashes(prompt, CAPACITY.page_size))
    routers[1].update({**replicas, gone: (CAPACITY, held)})
    asked = Request("y", prompt)
    assert place(routers[1], asked, "s0") == gone
    assert routers[1].confirm(asked, gone) == "prefix"


class Timeline:
    """Routers and replicas in simulated time: messages take a while, reports come late, and replicas refuse what is too much."""

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
        """Reports as the replicas are now; they arrive when they are old."""
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
        """Until so many have ended. `idle`: the longest time that a slot was free while some waited."""
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


@pytest.mark.parametrize("kwargs", [{"load_bound": 0.5}, {"affinity_floor": -0.1}, {"affinity_floor": 1.1}])
def test_settings_out_of_range_are_named(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PrefixBalancer(**kwargs)
