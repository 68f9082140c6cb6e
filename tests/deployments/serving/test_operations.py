"""What operators rely on, on a running Serve instance: scaling with the load, and a replica killed under streams.

`make test-serving` tests all of this at length (proofs/serving_proof.py).
"""

import asyncio
from collections.abc import Iterator

import pytest
from ray import serve

from orthrus.engine import Engine
from orthrus.requests.request import SamplingParams
from tests.local_cluster import (
    App,
    Clients,
    Stream,
    answers,
    check_failures,
    kill_under,
    tiny_args,
    until,
    wait_for,
)
from tests.serving import plain

# Several pages of the KV cache, so that there is a prefix to route by.
PROMPT = "".join(f"def add_{n}(a, b):\n    return a + b + {n}\n\n\n" for n in range(4))


@pytest.fixture(scope="module")
def app(url: str) -> Iterator[App]:
    """A second application beside the other tests' one: tiny engines that are soon full, and an impatient policy."""
    app = App("ops", f"{url}/ops")
    replica = tiny_args()["replica"]
    app.deploy(
        engine={"max_num_seqs": 4, "kv_cache_tokens": 8192},
        replica={
            "ray_actor_options": {**replica["ray_actor_options"], "num_cpus": 0.25},
            "autoscaling_config": {
                **replica["autoscaling_config"],
                "metrics_interval_s": 0.5,
                "look_back_period_s": 2,
                "upscale_delay_s": 1,
                "downscale_delay_s": 2,
            },
        },
    )
    try:
        yield app
    finally:
        serve.delete("ops", _blocking=False)


def test_a_load_step_adds_a_replica_and_a_kill_fails_only_begun_streams(app: App, ar: Engine) -> None:
    """1 client, then 12: a second replica. One of the two is killed under 16 more. Then no client, and one replica."""
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    text = plain(ar, PROMPT, params)
    streams = [Stream(PROMPT, 100) for _ in range(16)]

    async def main() -> tuple[Clients, Clients]:
        lone, many = Clients(app.completions, PROMPT, 100), Clients(app.completions, PROMPT, 100)
        lone.start(1)
        await until(lambda: lone.done, 60, "one answer")
        assert len(app.running()) == 1
        many.start(11)
        await asyncio.to_thread(wait_for, lambda: len(app.running()) == 2, 60, "two replicas")
        # Before those end, so that two stay.
        killing = asyncio.create_task(kill_under(app, streams, 6))
        await many.stop()
        await lone.stop()
        await killing
        await asyncio.to_thread(wait_for, lambda: len(app.running()) == 1, 60, "one replica")
        return lone, many

    lone, many = asyncio.run(main())
    # The replica may have had some of theirs, too.
    assert 1 <= len(check_failures([*streams, *lone.done, *many.done], text)) <= 4


def test_engine_router_and_policy_show_in_the_metrics(app: App) -> None:
    """After the test above; Ray exports what processes recorded every few seconds."""
    asyncio.run(answers(app.completions, [Stream("x", 1, session="s")]))
    wanted = [
        ("ray_orthrus_engine_cycles_total", "OrthrusReplica"),
        ("ray_orthrus_engine_kv_pages_total", "OrthrusReplica"),
        ("ray_orthrus_engine_prefix_hit_tokens_total", "OrthrusReplica"),
        ("ray_orthrus_routed_requests_total", "prefix"),
        ("ray_orthrus_routed_requests_total", "session"),
        ("ray_orthrus_autoscaling_wanted_replicas", "OrthrusReplica"),
        ("ray_orthrus_autoscaling_scalings_total", "up"),
        ("ray_orthrus_autoscaling_scalings_total", "down"),
    ]

    def missing() -> list[tuple[str, str]]:
        return [(name, label) for name, label in wanted if not any(label in k for k in app.samples(name))]

    wait_for(lambda: not missing(), 60, "all metrics")
