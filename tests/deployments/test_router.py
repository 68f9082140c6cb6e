"""The request router with Serve's own base class, over replicas that only count requests: no cluster, no network."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RunningReplica

from orthrus.deployments.replica.reports import Capacity
from orthrus.deployments.router import PrefixRouter
from orthrus.requests.request import Request, SamplingParams

DEPLOYMENT = DeploymentID(name="OrthrusReplica", app_name="orthrus")
SLOTS = 3
CAPACITY = Capacity(max_num_seqs=SLOTS, prefill_chunk=256, page_size=16, pages=512)
REPORT = {"sequences": 0, "prompts": 0.0, "pages": 0, "requests": b"", "prefixes": b""}


class CountingReplica(RunningReplica):
    """A replica as Serve shows it to a router. running: its requests, of all routers."""

    def __init__(self, name: str) -> None:
        self._replica_info = SimpleNamespace(
            replica_id=ReplicaID(name, DEPLOYMENT),
            max_ongoing_requests=SLOTS,
            replica_metadata=CAPACITY._asdict(),
            routing_stats=REPORT,
        )
        self.running = 0
        self.asked = 0
        self.dead = False

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        if self.dead:
            raise ActorDiedError
        return self.running


class Call:
    """The handle of a sent request, as a router gets it. The request has a slot of `replica` until it ends."""

    def __init__(self, replica: CountingReplica) -> None:
        self._replica = replica
        replica.running += 1
        self._callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        self._replica.running -= 1
        for callback in self._callbacks:
            callback(self)


class Caller:
    """Sends requests through a router as Serve does."""

    def __init__(self, *names: str) -> None:
        self.router = PrefixRouter(
            DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.router.initialize_state()
        self.replicas = {name: CountingReplica(name) for name in names}
        self.router.update_replicas(list(self.replicas.values()))
        self.calls: dict[str, Call] = {}
        self.where: dict[str, str] = {}

    def ask(self, number: int, http_request: str = "") -> "asyncio.Task[str]":
        """Send request `number`. The task gives the request's replica, once it is there."""
        request = Request(f"{number}", [1] * 100, SamplingParams(max_tokens=16))
        metadata = RequestMetadata(f"{number}", http_request or f"{number}")
        return asyncio.create_task(self._send(PendingRequest([request], {}, metadata)))

    async def _send(self, pending: PendingRequest, is_retry: bool = False) -> str:
        replica = await self.router._choose_replica_for_request(pending, is_retry=is_retry)
        replica_id, number = replica.replica_id, pending.args[0].request_id
        self.router.on_send_request(replica_id)
        if self.replicas[replica_id.unique_id].running >= SLOTS:
            self.router.on_new_queue_len_info(replica_id, SLOTS)
            return await self._send(pending, is_retry=True)
        self.calls[number] = Call(self.replicas[replica_id.unique_id])
        self.router.on_request_routed(pending, replica_id, self.calls[number])
        self.where[number] = replica_id.unique_id
        return replica_id.unique_id


async def settle() -> None:
    """Let all tasks run until they wait for a timer."""
    for _ in range(20):
        await asyncio.sleep(0)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def test_requests_wait_in_the_router_and_go_where_a_slot_gets_free_first() -> None:
    async def main() -> None:
        caller = Caller("a", "b")
        # Three prompts of each HTTP request: Serve has one id for them.
        asked = [caller.ask(number, f"http-{number // 3}") for number in range(10)]
        await settle()
        assert [task.done() for task in asked] == [True] * 6 + [False] * 4
        assert sorted(caller.where.values()) == ["a"] * 3 + ["b"] * 3
        asked[7].cancel()
        for ended, then in ((4, 6), (0, 8), (6, 9)):
            caller.calls[f"{ended}"].end()
            await settle()
            assert asked[then].done() and caller.where[f"{then}"] == caller.where[f"{ended}"]
        assert caller.router._balancer.waiting == 0 and not caller.router._grants
        assert all(replica.asked == 1 for replica in caller.replicas.values()), "by Serve, when they were new"
        for call in caller.calls.values():
            call.end()
        await settle()
        ids = [replica.replica_id for replica in caller.replicas.values()]
        assert [caller.router._balancer.requests(replica_id) for replica_id in ids] == [0, 0]

    run(main)


def test_a_refused_request_waits_until_the_replica_says_that_it_has_room() -> None:
    """Another router's requests fill the replica. Their ends are learned by polling, which stops when no request waits."""

    async def main() -> None:
        caller = Caller("a")
        await settle()
        replica = caller.replicas["a"]
        replica.running, replica.asked = SLOTS, 0
        first, second = caller.ask(0), caller.ask(1)
        await settle()
        assert not first.done() and not second.done()
        replica.running -= 1
        assert await first == "a" and 1 <= replica.asked <= 2
        await settle()
        assert not second.done()
        replica.running -= 1
        assert await second == "a"
        asked = replica.asked
        await asyncio.sleep(0.6)
        assert replica.asked == asked

    run(main)


def test_requests_that_wait_outlive_their_replicas() -> None:
    async def main() -> None:
        caller = Caller("a")
        asked = [caller.ask(number) for number in range(SLOTS + 2)]
        await settle()
        assert [task.done() for task in asked] == [True] * SLOTS + [False] * 2
        caller.replicas["a"].dead = True
        await asyncio.sleep(0.5)  # It is asked meanwhile.
        assert not caller.router.curr_replicas
        caller.replicas = {"b": CountingReplica("b")}
        caller.router.update_replicas(list(caller.replicas.values()))
        assert await asked[-1] == await asked[-2] == "b"

    run(main)


def test_a_replica_that_could_not_be_reached_gets_nothing_until_it_answers() -> None:
    async def main() -> None:
        caller = Caller("a", "b")
        await settle()
        caller.router.on_replica_actor_unavailable(caller.replicas["a"].replica_id)
        asked = [caller.ask(number) for number in range(SLOTS + 1)]
        await settle()
        assert set(caller.where.values()) == {"b"} and not asked[-1].done()
        assert await asked[-1] == "a"

    run(main)


def test_an_idle_replica_that_could_not_be_reached_is_asked_though_nothing_waits() -> None:
    """It has nothing new to report, and others may have room for all requests."""

    async def main() -> None:
        caller = Caller("a", "b")
        await settle()
        replicas = caller.replicas.values()
        for replica in replicas:
            caller.router.on_replica_actor_unavailable(replica.replica_id)
            replica.asked = 0
        while caller.router._asking is not None and not caller.router._asking.done():
            await asyncio.sleep(0.05)
        assert [replica.asked for replica in replicas] == [1, 1]
        assert await caller.ask(0) != await caller.ask(1), "both have room again"

    run(main)


def test_other_calls_go_anywhere() -> None:
    async def main() -> None:
        caller = Caller("a")
        [candidates] = await caller.router.choose_replicas(
            list(caller.replicas.values()), PendingRequest(["stats"], {}, RequestMetadata("0", "0"))
        )
        assert candidates == list(caller.replicas.values())

    run(main)


@pytest.mark.parametrize("setting", [{"load_bound": 0.5}, {"affinity_floor": 2.0}])
def test_settings_are_those_of_the_balancer(setting: dict[str, float]) -> None:
    async def main() -> None:
        router = PrefixRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
        with pytest.raises(ValueError, match=next(iter(setting))):
            router.initialize_state(**setting)

    run(main)
