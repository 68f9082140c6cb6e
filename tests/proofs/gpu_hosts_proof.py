"""Where replicas of several GPUs are placed, on a Ray cluster whose hosts say that they have GPUs: `make test-ranks` runs it.

All hosts are this machine. Their GPUs exist only as numbers in Ray, so with `device: auto` the ranks run on the CPU. Placing and
scaling of replicas work as with real GPUs.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState

from orthrus.deployments.launch.environment import free_port, set_environment
from orthrus.deployments.launch.serve import serve_config
from orthrus.errors import ConfigError
from tests.local_cluster import ROOT, App, Clients, wait_for
from tests.proofs.ranks_proof import PROMPT, TWO_RANKS, one_rank_text

TOKENS = 48


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, and a host of one."""
    set_environment()
    os.environ["PYTHONPATH"] = str(ROOT)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    try:
        started.add_node(num_cpus=4, num_gpus=1)
        yield started
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        started.shutdown()


def config_file(folder: Path, size: int, port: int) -> Path:
    """configs/tiny-cpu.yaml with replicas of `size` GPUs."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    config["grpc_options"]["port"] = free_port()
    args = config["applications"][0]["args"]
    args["engine"] |= TWO_RANKS | {
        "device": "auto",
        "tensor_parallel_size": size,
        "max_num_seqs": 2,
        "kv_cache_tokens": 2048,
        "adaptive_draft": False,
    }
    args["replica"]["ray_actor_options"] |= {"num_cpus": 1, "num_gpus": size}
    args["replica"]["autoscaling_config"] |= {
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
    }
    file = folder / f"{size}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def deploy(cluster: Cluster, file: Path) -> None:
    """As `orthrus serve FILE --address ADDRESS` does."""
    if ray.is_initialized():
        ray.shutdown()
    serve_config(file, address=cluster.address)


def hosts_of_replicas() -> list[str]:
    """The nodes of the replicas that run."""
    apps = _get_global_client().get_serve_details()["applications"]
    replicas = apps["orthrus"]["deployments"]["OrthrusReplica"]["replicas"]
    return [found["node_id"] for found in replicas if found["state"] == ReplicaState.RUNNING]


def test_replicas_of_two_gpus_are_placed_on_one_host_each(cluster: Cluster, tmp_path: Path) -> None:
    """Refused without hosts of two GPUs, and for four GPUs. Then one replica, and under load a second one on another host."""
    port = free_port()
    needs = "a replica must have 1 CPU, {} GPU on one node, .* Those with GPUs have {}. Ask for less, or add a node"
    with pytest.raises(ConfigError, match=needs.format(2, "4 CPU, 1 GPU")):
        deploy(cluster, config_file(tmp_path, 2, port))
    hosts = {cluster.add_node(num_cpus=4, num_gpus=2).node_id for _ in range(2)}
    with pytest.raises(ConfigError, match=needs.format(4, "4 CPU, 1 GPU; or 4 CPU, 2 GPU")):
        deploy(cluster, config_file(tmp_path, 4, port))
    deploy(cluster, config_file(tmp_path, 2, port))
    [first] = hosts_of_replicas()
    assert first in hosts

    async def main() -> Clients:
        clients = Clients(App("orthrus", f"http://127.0.0.1:{port}").completions, PROMPT, TOKENS)
        clients.start(6)
        try:
            await asyncio.to_thread(wait_for, lambda: len(hosts_of_replicas()) == 2, 60, "two replicas")
        finally:
            await clients.stop()
        return clients

    clients = asyncio.run(main())
    assert set(hosts_of_replicas()) == hosts
    assert not clients.errors
    assert {stream.text for stream in clients.done} == {one_rank_text(TOKENS)}
