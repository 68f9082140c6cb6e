"""What operators rely on, on a running Serve instance: scaling with the load, and a replica killed under streams."""

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState

from deployments.app import build
from tests.conftest import ROOT

APP = "ops"
MODEL = "orthrus-tiny"
# Several pages of the KV cache, so that there is a prefix to route by.
PROMPT = "".join(f"def add_{n}(a, b):\n    return a + b + {n}\n\n\n" for n in range(4))


@pytest.fixture(scope="module")
def ops(url: str) -> Iterator[openai.OpenAI]:
    """A second application beside the other tests' one: tiny engines that are soon full, and an impatient policy."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    args = config["applications"][0]["args"]
    args["engine"] |= {"max_num_seqs": 4, "kv_cache_tokens": 8192, "adaptive_draft": False}
    args["replica"]["ray_actor_options"]["num_cpus"] = 0.25
    args["replica"]["autoscaling_config"] |= {
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
    }
    serve.run(build(args), name=APP, route_prefix=f"/{APP}")
    try:
        yield openai.OpenAI(base_url=f"{url}/{APP}/v1", api_key="none", max_retries=0)
    finally:
        serve.delete(APP)


@dataclass
class Clients:
    """Clients that stream answers one after the other until `stop`, each text noted or the error that ended it."""

    client: openai.OpenAI
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._run)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            text = ""
            try:
                events = self.client.completions.create(
                    model=MODEL,
                    prompt=PROMPT,
                    max_tokens=64,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for event in events:
                    text += event.choices[0].text
                self.texts.append(text)
            except openai.OpenAIError as error:
                self.errors.append(f"after {len(text)} characters: {error}")


def replica_pids() -> set[int]:
    """Processes of the replicas that run."""
    details = _get_global_client().get_serve_details()["applications"][APP]["deployments"]["OrthrusReplica"]
    return {r["pid"] for r in details["replicas"] if r["state"] == ReplicaState.RUNNING}


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, serve.status().applications[APP]
        time.sleep(0.1)
    return found


def test_a_killed_replica_costs_only_the_streams_that_it_had_begun(ops: openai.OpenAI) -> None:
    """12 clients on two replicas of 4 sequences: some have begun, others wait when one replica is killed."""
    clients = Clients(ops)
    try:
        clients.start(12)
        wait_for(lambda: len(replica_pids()) == 2)
        finished = len(clients.texts)
        wait_for(lambda: len(clients.texts) >= finished + 6)
        assert not clients.errors
        victim, survivor = replica_pids()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(replica_pids() - {victim}) == 2)
        finished, failed = len(clients.texts), len(clients.errors)
        wait_for(lambda: len(clients.texts) >= finished + 6)
        assert survivor in replica_pids()
    finally:
        clients.stop()
    assert len(clients.errors) == failed, "nothing fails once the replica has been replaced"
    assert 0 < failed <= 4, clients.errors
    for error in clients.errors:
        assert "replica that was answering has stopped" in error and not error.startswith("after 0 "), error
    assert len(set(clients.texts)) == 1, "the same request has the same answer on every replica"


def test_a_load_step_adds_a_replica_and_takes_it_away_again(ops: openai.OpenAI) -> None:
    lone, many = Clients(ops), Clients(ops)
    try:
        lone.start(1)
        wait_for(lambda: len(replica_pids()) == 1)
        many.start(11)
        wait_for(lambda: len(replica_pids()) == 2)
        many.stop()
        wait_for(lambda: len(replica_pids()) == 1)
        finished = len(lone.texts)
        wait_for(lambda: len(lone.texts) > finished + 1)
    finally:
        many.stop()
        lone.stop()
    assert not lone.errors and not many.errors


def test_engine_router_and_policy_show_in_the_metrics(ops: openai.OpenAI) -> None:
    """After the tests above; Ray exports what processes recorded every 10 s."""
    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [
        ("ray_orthrus_engine_cycles_total", 'deployment="OrthrusReplica"'),
        ("ray_orthrus_engine_kv_pages_total", 'deployment="OrthrusReplica"'),
        ("ray_orthrus_engine_prefix_hit_tokens_total", 'deployment="OrthrusReplica"'),
        ("ray_orthrus_routed_requests_total", 'by="prefix"'),
        ("ray_orthrus_autoscaling_wanted_replicas", 'deployment="OrthrusReplica"'),
        ("ray_orthrus_autoscaling_scalings_total", 'direction="up"'),
    ]

    def exported() -> bool:
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if f'application="{APP}"' in line]
        return all(any(line.startswith(name) and tag in line for line in ours) for name, tag in wanted)

    wait_for(exported)
