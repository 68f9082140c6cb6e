"""What operators rely on, under load and for real: `make test-serving` runs it, in minutes.

Load step, shared prefixes over replicas, a replica and the proxy killed under streams, an engine that fails, clients that
misbehave, and a rolling update. Every answer is greedy and must be the one that the model gives alone.
"""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from orthrus.deployments.bench.serve_bench import ServeBenchOptions, serve_bench
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.plan import RowGroup
from orthrus.requests.request import SamplingParams
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows
from tests.local_cluster import (
    ROOT,
    STREAM_SECONDS,
    App,
    Clients,
    Replica,
    Stream,
    answers,
    check_failures,
    client_session,
    kill_under,
    local_cluster,
    pids,
    processes,
    serve_log,
    tiny_args,
    under_way,
    until,
    wait_for,
)
from tests.proofs.misbehaving import MisbehavingClients
from tests.serving import plain

PROMPT = "".join(f"def add_{n}(a, b):\n    return a + b + {n}\n\n\n" for n in range(4))
RECOVERY_SECONDS = 60
"""How long a replacement may take. On a quiet machine it takes 5 to 10 s."""


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    with local_cluster() as started:
        yield started


def expected(ar: Engine, prompt: str, max_tokens: int) -> str:
    return plain(ar, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


def fixed(replicas: int, **engine: int) -> dict[str, dict[str, object]]:
    """Changes of the config: a fixed number of replicas, without autoscaling."""
    return {
        "engine": {"max_num_seqs": 12, "kv_cache_tokens": 16384, **engine},
        "replica": {
            "num_replicas": replicas,
            "autoscaling_config": None,
            "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        },
        "ingress": {"ray_actor_options": {"num_cpus": 0.1}},
    }


def test_the_benchmark_measures() -> None:
    """Before the others, since it starts a Serve instance of its own. What it measures depends on the machine."""
    options = ServeBenchOptions(
        ROOT / "configs" / "tiny-cpu.yaml", streams=4, requests=1, rounds=1, pass_ms=20.0
    )
    report = serve_bench(options)
    assert report.throughput.median > 0 and report.engine_tokens_per_second < 4 / 0.020
    assert report.engine_ms > 20 and report.serve_ms > 20 and report.bare_ms > 0
    assert f"{report.first_token}" in report.to_text()


def test_no_slot_is_free_while_requests_wait(app: App, ar: Engine) -> None:
    """32 equal requests at once on two replicas of 12 sequences: 24 run, and each that ends lets another begin."""
    app.deploy(**fixed(2))
    text = expected(ar, PROMPT, 200)
    streams = [Stream(PROMPT, 200) for _ in range(32)]
    replicas = app.running()
    free, longest, most = 0.0, 0.0, 0

    async def main() -> None:
        nonlocal free, longest, most
        asked = asyncio.create_task(answers(app.completions, streams))
        while not all(stream.events for stream in streams):
            running = [await asyncio.to_thread(replica.report) for replica in replicas]
            sequences, now = [report["sequences"] for report in running], time.monotonic()
            assert max(sequences) <= 12, "a replica has a queue"
            most = max(most, sum(sequences))
            # Before the first requests have come, no slot is wasted.
            free = free if most and min(sequences) < 12 else now
            longest = max(longest, now - free)
            await asyncio.sleep(0.02)
        await asked

    asyncio.run(main())
    print(f"a slot was free for {longest:.2f} s at most while some had not begun; at most {most} ran")
    assert [stream.text for stream in streams] == [text] * 32
    assert most == 24 and longest < 1.0


def test_a_killed_replica_fails_only_the_streams_that_it_had_begun(app: App, ar: Engine) -> None:
    """32 streams on two replicas of 12 sequences: some have begun, others wait."""
    app.deploy(**fixed(2))
    text = expected(ar, PROMPT, 400)
    streams = [Stream(PROMPT, 400) for _ in range(32)]
    replicas = app.running()

    async def main() -> None:
        recovery = asyncio.create_task(recovered(app, replicas))
        await kill_under(app, streams, 20)
        await recovery

    asyncio.run(main())
    assert 1 <= len(check_failures(streams, text)) <= 12
    check_nothing_stays(app)


def test_a_failed_engine_fails_only_the_streams_that_it_had_begun(
    app: App, ar: Engine, tmp_path: Path
) -> None:
    """Either of the two replicas may be the one that fails. Requests that it has accepted but not begun do not fail."""
    order = tmp_path / "fail"
    app.deploy(LoadFailing(order), **fixed(2))
    text = expected(ar, PROMPT, 400)

    async def fail(streams: list[Stream], begun: int) -> None:
        replicas = app.running()
        recovery = asyncio.create_task(recovered(app, replicas))
        run = asyncio.create_task(answers(app.completions, streams))
        await under_way(streams, begun)
        order.touch()
        await recovery
        await run

    order.touch()
    waiting = [Stream(PROMPT, 400) for _ in range(4)]
    asyncio.run(fail(waiting, 0))
    assert check_failures(waiting, text) == []
    streams = [Stream(PROMPT, 400) for _ in range(32)]
    asyncio.run(fail(streams, 20))
    assert 1 <= len(check_failures(streams, text)) <= 12
    assert "out of order" in serve_log("replica")
    check_nothing_stays(app)


@dataclass(frozen=True)
class LoadFailing:
    """Loads engines of which the first to find the file `order` fails."""

    order: Path

    def __call__(self, config: EngineConfig) -> Engine:
        engine = Engine.from_pretrained(config)
        engine.use_runner(FailingRunner(engine, self.order))
        return engine


class FailingRunner(EagerRunner):
    def __init__(self, engine: Engine, order: Path) -> None:
        super().__init__(engine.forward, engine.cache)
        self._order = order

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        with suppress(FileNotFoundError):
            self._order.unlink()
            raise RuntimeError("out of order")
        return super().launch(groups, rows)


async def recovered(app: App, replicas: list[Replica]) -> None:
    """Wait until one of `replicas` has died, and then, for at most `RECOVERY_SECONDS`, until there are as many again."""
    before = {replica.pid for replica in replicas}

    def replaced() -> bool:
        running = {replica.pid for replica in app.running()}
        return running != before and len(running) == len(before)

    def all_live() -> bool:
        return all(processes().get(pid, ("Z",))[0] != "Z" for pid in before)

    await until(lambda: not all_live(), STREAM_SECONDS, "a replica has died")
    died = time.monotonic()
    await asyncio.to_thread(wait_for, replaced, RECOVERY_SECONDS, "a new replica")
    print(f"recovered {time.monotonic() - died:.1f} s after a replica's death")


@pytest.mark.parametrize("process", ["haproxy", "HAProxyManager", "orthrus:Ingress"])
def test_a_killed_proxy_is_replaced_and_nothing_of_it_stays(app: App, ar: Engine, process: str) -> None:
    """32 streams go through one process: they end with it, and free what they held."""
    app.deploy(**fixed(2))
    text = expected(ar, PROMPT, 40)

    async def main() -> None:
        streams = [Stream(PROMPT, 1500) for _ in range(32)]
        run = asyncio.create_task(answers(app.completions, streams))
        await under_way(streams, 24)
        for pid in pids(process):
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        # Until a new proxy knows the replicas, requests get errors. After that they are answered as before.
        again = [Stream(PROMPT, 40)]
        while (await answers(app.completions, again))[0].error:
            assert time.monotonic() - killed < RECOVERY_SECONDS, again[0].error
            await asyncio.sleep(0.2)
            again = [Stream(PROMPT, 40)]
        seconds = time.monotonic() - killed
        print(f"{process}: an answer {seconds:.1f} s after the kill")
        assert seconds < RECOVERY_SECONDS
        await run
        assert all(stream.error for stream in streams)
        again = await answers(app.completions, [Stream(PROMPT, 40) for _ in range(16)])
        assert [stream.text for stream in again] == [text] * 16

    asyncio.run(main())
    check_nothing_stays(app)


def test_a_load_step_scales_up_and_back_to_none(app: App, ar: Engine) -> None:
    """1 client, then 32, then 1, then none, then one again: 1, 3, 1, 0 and 1 replicas, each change explained."""
    app.deploy(
        engine={"max_num_seqs": 6, "kv_cache_tokens": 8192},
        replica={
            "ray_actor_options": {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
            "autoscaling_config": {
                **tiny_args()["replica"]["autoscaling_config"],
                "min_replicas": 0,
                "initial_replicas": 1,
                "max_replicas": 3,
                "metrics_interval_s": 0.5,
                "look_back_period_s": 2,
                "upscale_delay_s": 1,
                "downscale_delay_s": 4,
                "downscale_to_zero_delay_s": 4,
            },
        },
        ingress={"ray_actor_options": {"num_cpus": 0.1}},
    )
    text = expected(ar, PROMPT, 64)

    async def replicas(count: int) -> None:
        await asyncio.to_thread(wait_for, lambda: len(app.running()) == count, 180, f"{count} replicas")

    async def main() -> list[Stream]:
        lone, many = Clients(app.completions, PROMPT, 64), Clients(app.completions, PROMPT, 64)
        lone.start(1)
        await until(lambda: len(lone.done) >= 2, 60, "two answers")
        assert len(app.running()) == 1
        many.start(31)
        await replicas(3)
        await many.stop()
        await replicas(1)
        await lone.stop()
        await replicas(0)
        return [*lone.done, *many.done, *await answers(app.completions, [Stream(PROMPT, 64)])]

    streams = asyncio.run(main())
    assert not [stream.error for stream in streams if stream.error]
    assert {stream.text for stream in streams} == {text}
    pattern = r"autoscaling OrthrusReplica: scaled (up|down) from (\d+) to (\d+): (.+)"
    steps = [(int(a), int(b), why) for _, a, b, why in re.findall(pattern, serve_log("controller"))]
    print(*steps, sep="\n")
    assert [a for a, _, _ in steps] == [1, *(b for _, b, _ in steps[:-1])], "no change went unexplained"
    assert max(b for _, b, _ in steps) == 3 and [b for _, b, _ in steps[-2:]] == [0, 1]
    reasons = {
        (a < b): {why.split(" ")[0] for x, b2, why in steps if (x < b2) == (a < b)} for a, b, _ in steps
    }
    assert reasons[True] <= {"rows", "KV", "a", "requests"} and "no" in reasons[False], reasons

    def counted() -> bool:
        counts = app.samples("ray_orthrus_autoscaling_scalings_total")
        return sum(counts.values()) >= len(steps)

    wait_for(counted, 30, "every change counted")


def test_prefixes_are_found_on_three_replicas_as_on_one(app: App) -> None:
    """Many prefixes: the hit rate of three replicas is that of one. One hot prefix: all three share it."""
    rng = random.Random(0)
    heads = [f"# {rng.random()}\n" + PROMPT * 2 for _ in range(12)]
    prompts = [f"{rng.choice(heads)}# {rng.random()}\n" for _ in range(360)]
    hot = [f"{heads[0]}# {rng.random()}\n" for _ in range(360)]

    def run(replicas: int, prompts: list[str]) -> tuple[float, list[float]]:
        """Hit rate, and requests by replica, with 4 requests in flight for each."""
        app.deploy(**fixed(replicas, max_num_seqs=8 + replicas))  # Another version: new replicas.
        names = {replica.name for replica in app.running()}
        streams = [Stream(prompt, 8) for prompt in prompts]

        async def main() -> None:
            left = iter(streams)

            async def client() -> None:
                async with client_session() as session:
                    for stream in left:
                        await stream.run(session, app.completions)

            await asyncio.gather(*(client() for _ in range(4 * replicas)))

        asyncio.run(main())
        assert not [stream.error for stream in streams if stream.error]

        def served() -> list[float]:
            counts = app.samples("ray_orthrus_engine_admitted_total")
            ours = [n for labels, n in counts.items() if names & set(labels)]
            return ours if sum(ours) == len(streams) else []

        counts = wait_for(served, 60, "all requests counted")
        return sum(s.cached_tokens for s in streams) / sum(s.prompt_tokens for s in streams), counts

    alone, _ = run(1, prompts)
    three, counts = run(3, prompts)
    print(f"hit rate {alone:.3f} on one, {three:.3f} on three: {counts}")
    assert alone > 0.8 and three >= 0.9 * alone
    _, counts = run(3, hot)
    print(f"one hot prefix: {counts}")
    assert len(counts) == 3 and max(counts) <= 1.5 * len(hot) / 3


def test_clients_that_misbehave_leave_nothing_behind(app: App, ar: Engine) -> None:
    """Clients that never read, that go away, that stop halfway through a request; and 1,000 that cancel."""
    app.deploy(**fixed(1))
    clients = MisbehavingClients(app, PROMPT, expected(ar, PROMPT, 40))
    clients.misbehave()
    asyncio.run(clients.cancel(300))  # From now on, pools and caches should not grow.
    before = clients.resources()
    clients.misbehave()
    asyncio.run(clients.cancel(1000))
    wait_for(
        lambda: all(clients.resources()[name][1] <= files + 4 for name, (_, files) in before.items()),
        30,
        "files closed",
    )
    after = clients.resources()
    print(before, after)
    for name, (memory, _) in after.items():
        assert memory <= before[name][0] * 1.05 + 8, (name, before, after)
    check_nothing_stays(app)


def test_a_rolling_update_fails_no_request(app: App, ar: Engine) -> None:
    """16 clients while replicas and ingress are replaced by those of another config, twice."""
    app.deploy(**fixed(2))
    text = expected(ar, PROMPT, 64)

    async def main() -> list[Stream]:
        clients = Clients(app.completions, PROMPT, 64)
        clients.start(16)
        await until(lambda: len(clients.done) >= 16, 90, "16 answers")
        for number in (13, 14):
            before = {r.pid for d in ("OrthrusReplica", "Ingress") for r in app.running(d)}
            await asyncio.to_thread(app.deploy, **fixed(2, max_num_seqs=number))
            after = {r.pid for d in ("OrthrusReplica", "Ingress") for r in app.running(d)}
            assert not before & after
            enough = len(clients.done) + 16
            await until(lambda: len(clients.done) >= enough, 90, "16 answers after the update")  # noqa: B023
        await clients.stop()
        return clients.done

    streams = asyncio.run(main())
    print(len(streams), "requests")
    assert not [stream.error for stream in streams if stream.error]
    assert {stream.text for stream in streams} == {text}
    check_nothing_stays(app)


def check_nothing_stays(app: App) -> None:
    """No pages are held, there is no zombie process, and one HAProxy runs."""
    wait_for(lambda: all(replica.free for replica in app.running()), 30, "no pages held")
    wait_for(lambda: len(pids("bin/haproxy")) == 1, 60, "one HAProxy")
    dead = {pid: command for pid, (state, command) in processes().items() if state == "Z"}
    assert not dead
