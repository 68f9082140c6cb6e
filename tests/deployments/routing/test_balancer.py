"""Where requests go and when: the balancer over simulated replicas with real page pools, on a clock of its own."""

import random
from collections import Counter
from typing import Any

import pytest

from orthrus.cache.page_hash import page_hashes
from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.deployments.routing.load import request_load
from orthrus.requests.request import Request, SamplingParams
from tests.deployments.routing.simulated import CAPACITY, Cluster, place, report, shared_prefix_traffic


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


def test_requests_of_one_hot_prefix_go_to_several_replicas() -> None:
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


def test_an_old_report_counts_only_the_requests_that_it_names() -> None:
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


def test_requests_wait_for_room_and_are_served_in_order() -> None:
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
    # Another replica takes the rest.
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


def test_a_prompt_whose_pages_fit_nowhere_lets_at_most_eight_pass() -> None:
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
    # An empty replica takes it, since it will never have more room.
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


def test_a_prompt_that_is_scored_takes_nothing_from_the_cache() -> None:
    balancer = PrefixBalancer()
    prompt = list(range(800))
    prefixes = page_hashes(prompt, CAPACITY.page_size)
    balancer.update({"a": (CAPACITY, report(["theirs"], pages=490, prefixes=prefixes))})
    scored = Request("scored", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    balancer.add(scored)
    assert balancer.dispatch() == [], "it needs 50 pages, and 22 are free"
    balancer.update({"a": (CAPACITY, report(prefixes=prefixes))})
    assert balancer.dispatch() == [("scored", "a")]
    assert balancer.confirm(scored, "a") == "load"
    assert balancer.use("a") == pytest.approx((1 + 800 / 256) / 16)
    assert request_load(scored, CAPACITY).pages == 50, "no page for an answer"


def test_a_freed_slot_goes_to_a_cached_prefix_but_at_most_eight_pass() -> None:
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


def test_priority_comes_before_prefixes_and_salts_share_none() -> None:
    balancer = PrefixBalancer()
    one = CAPACITY._replace(max_num_seqs=1)
    prompt = [1] * 100
    held = report(prefixes=page_hashes(prompt, CAPACITY.page_size))
    balancer.update({"a": (one, held)})
    params = SamplingParams(max_tokens=16)
    salted = Request("salted", prompt, params, cache_salt="mine")
    assert place(balancer, salted) == "a" and balancer.confirm(salted, "a") == "load"
    # Of the two of lower priority, one is cached. It gets a slot after the urgent one, and before the other.
    for name, tokens, priority in (("other", [2] * 100, 1), ("cached", prompt, 1), ("urgent", [3] * 100, -1)):
        balancer.add(Request(name, tokens, params, priority=priority))
    running = "salted"
    for expected in ("urgent", "cached", "other"):
        balancer.done(running)
        assert balancer.dispatch() == [(expected, "a")]
        running = expected


def test_a_refused_request_keeps_its_place_and_its_replica_counts_as_full() -> None:
    balancer = PrefixBalancer()
    two = CAPACITY._replace(max_num_seqs=2)
    balancer.update({"a": (two, report())})
    refused, also = (Request(name, [1] * 20, SamplingParams(max_tokens=16)) for name in ("refused", "also"))
    assert place(balancer, refused) == place(balancer, also) == "a"
    balancer.add(Request("later", [2] * 20, SamplingParams(max_tokens=16)))
    balancer.add(refused)
    balancer.add(also)
    # Another router's requests had the slots, and one or two of those still run.
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


def test_a_dead_replica_gets_nothing_and_an_unconfirmed_choice_expires() -> None:
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


def test_a_request_waits_again_if_its_replica_dies_before_accepting_it() -> None:
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
    # If the session's replica is busy, another one is chosen. A cached prefix elsewhere comes first, too.
    busy = report([f"{i}" for i in range(12)], pages=300)
    routers[1].update({**replicas, first: (CAPACITY, busy)})
    assert place(routers[1], Request("x", [1] * 5), "s0") != first
    prompt = list(range(100))
    held = report(pages=6, prefixes=page_hashes(prompt, CAPACITY.page_size))
    routers[1].update({**replicas, gone: (CAPACITY, held)})
    asked = Request("y", prompt)
    assert place(routers[1], asked, "s0") == gone
    assert routers[1].confirm(asked, gone) == "prefix"


@pytest.mark.parametrize("kwargs", [{"load_bound": 0.5}, {"affinity_floor": -0.1}, {"affinity_floor": 1.1}])
def test_settings_out_of_range_are_named(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PrefixBalancer(**kwargs)
