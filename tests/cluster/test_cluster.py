"""The cluster file: Ray accepts it, and what the Serve configs ask for fits on its nodes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.cluster.check import check_config
from orthrus.cluster.config import ClusterConfig
from orthrus.deployments.config.placement import actor_demand, check_room
from orthrus.engine.config import EngineConfig
from orthrus.engine.pass_limits import exchange_sizes
from orthrus.errors import ConfigError
from orthrus.models.shapes import QWEN3_SHAPES
from tests.conftest import ROOT

CLUSTER_FILE = ROOT / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> ClusterConfig:
    return ClusterConfig.load(CLUSTER_FILE)


def test_ray_accepts_it(cluster: ClusterConfig) -> None:
    assert cluster.name == "orthrus"
    assert "GPU" not in cluster.head.resources
    assert [node.name for node in cluster.workers] == ["cpu", "h100", "h200"]
    assert [node.resources.get("GPU", 0) for node in cluster.workers] == [0, 8, 8]
    assert sum(node.min_workers for node in cluster.workers) <= cluster.max_workers


def test_what_the_gpu_config_asks_for_fits(cluster: ClusterConfig) -> None:
    config = yaml.safe_load((ROOT / "configs" / "qwen3-8b-h100.yaml").read_text())
    args = config["applications"][0]["args"]
    replica = actor_demand(args["replica"]["ray_actor_options"])
    assert replica["GPU"] == 1
    assert [node.name for node in cluster.placements(replica)] == ["h100"]
    assert cluster.placements(actor_demand(args["ingress"]["ray_actor_options"]))
    room = sum(node.max_workers * node.resources["GPU"] for node in cluster.placements(replica))
    assert args["replica"]["autoscaling_config"]["max_replicas"] <= room


def test_a_replica_of_several_gpus_is_placed_on_one_node(cluster: ClusterConfig, tmp_path: Path) -> None:
    """A replica of four GPUs does not fit on two nodes with two GPUs each."""
    path = ROOT / "configs" / "qwen3-72b-4xh100.yaml"
    replica = actor_demand(
        yaml.safe_load(path.read_text())["applications"][0]["args"]["replica"]["ray_actor_options"]
    )
    assert [node.name for node in cluster.placements(replica)] == ["h100"]
    assert "2 on a node of type h100" in "\n".join(check_config(path, CLUSTER_FILE))
    small = yaml.safe_load(CLUSTER_FILE.read_text())
    small["available_node_types"]["h100"]["resources"]["GPU"] = 2
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small))
    with pytest.raises(ConfigError, match=r"no node type of .*small.yaml has 4 CPU, 4 GPU, H100"):
        list(check_config(path, file))


def test_config_check_counts_what_gpus_exchange() -> None:
    """For the 72B shape on two GPUs: 2,560 rows of 8,192 sums, and 768 rows of logits."""
    path = ROOT / "configs" / "qwen3-72b-2xh200.yaml"
    engine = EngineConfig.model_validate(
        yaml.safe_load(path.read_text())["applications"][0]["args"]["engine"]
    )
    places, count = exchange_sizes(engine, QWEN3_SHAPES["72B"]).layout(2)
    sums = 2 * 2 * 4 * 2560 * 8192
    logits = 4 * 768 * QWEN3_SHAPES["72B"].vocab_size
    assert sums + logits < count < 1.01 * (sums + logits)
    assert f", {count / (1 << 30):.1f} GiB for what they exchange" in "\n".join(
        check_config(path, CLUSTER_FILE)
    )
    assert list(places.values()) == sorted(places.values())


def test_72b_on_four_h100s_leaves_room_for_64_sequences_of_4096_tokens() -> None:
    said = "\n".join(check_config(ROOT / "configs" / "qwen3-72b-4xh100.yaml", CLUSTER_FILE))
    room = re.search(r"KV cache .* for (\d+) tokens", said)
    assert room is not None and int(room[1]) >= 64 * 4096


def test_resources_that_actors_demand() -> None:
    assert actor_demand({}) == actor_demand({"num_cpus": None}) == {"CPU": 1}
    options = {"num_cpus": 2, "num_gpus": 1, "accelerator_type": "H100", "resources": {"rack": 1}}
    assert actor_demand(options) == {"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001, "rack": 1}


def test_what_no_node_has_is_placed_nowhere(cluster: ClusterConfig) -> None:
    assert cluster.placements({"CPU": 1, "GPU": 9}) == []
    assert cluster.placements({"accelerator_type:A100": 0.001}) == []


HEAD = {"CPU": 4.0}
TWO_GPUS = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H200": 1.0}
DEMAND = actor_demand({"num_cpus": 4, "num_gpus": 4, "accelerator_type": "H200"})


def test_what_no_node_of_a_running_cluster_can_take_is_refused() -> None:
    message = "4 CPU, 4 GPU, H200 on one node, .* Those with GPUs have 16 CPU, 2 GPU, H200. Ask for less"
    with pytest.raises(ConfigError, match=message):
        check_room(DEMAND, [HEAD, TWO_GPUS, TWO_GPUS], [HEAD])


@pytest.mark.parametrize(
    ("nodes", "groups"),
    [
        ([HEAD, TWO_GPUS | {"GPU": 4.0}], []),
        ([HEAD], []),
        ([HEAD, TWO_GPUS], [TWO_GPUS | {"GPU": 8.0}]),
    ],
    ids=["a node fits", "no GPU node has joined yet", "the autoscaler has a kind that fits"],
)
def test_what_may_be_placed_later_is_not_refused(
    nodes: list[dict[str, float]], groups: list[dict[str, float]]
) -> None:
    check_room(DEMAND, nodes, groups)
    check_room(actor_demand({"num_cpus": 64}), [HEAD], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_workers": "four"}, "max_workers"),
        ({"head_node_type": "none"}, "head_node_type"),
        ({"workers": 3}, "workers"),
        ({"provider": None}, "provider"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = {**yaml.safe_load(CLUSTER_FILE.read_text()), **change}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml"):
        ClusterConfig.load(tmp_path / "none.yaml")


def test_ray_accepts_the_file_for_given_hosts() -> None:
    assert ClusterConfig.load(ROOT / "cluster" / "local.yaml").max_workers == 2
