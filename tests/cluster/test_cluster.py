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


def test_a_context_without_a_setting_is_no_longer_than_the_cache(tmp_path: Path) -> None:
    """The model has 40960 positions. As at a replica's start, the cache that is set lowers the context."""
    config = yaml.safe_load((ROOT / "configs" / "qwen3-8b-h100.yaml").read_text())
    engine = config["applications"][0]["args"]["engine"]
    del engine["max_model_len"]
    engine["kv_cache_tokens"] = 20_000
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    assert "for 20000 tokens (1.0 full contexts)" in "\n".join(check_config(file, CLUSTER_FILE))


def check_8b_on(tmp_path: Path, cluster: dict[str, Any], fewest: int) -> str:
    """What the check says of the 8B config with so many replicas at least, and 16 at most, on a cluster."""
    config = yaml.safe_load((ROOT / "configs" / "qwen3-8b-h100.yaml").read_text())
    replica = config["applications"][0]["args"]["replica"]
    replica["autoscaling_config"] |= {"min_replicas": fewest, "max_replicas": 16}
    files = {"serve.yaml": config, "cluster.yaml": cluster}
    for name, data in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(data))
    return "\n".join(check_config(*(tmp_path / name for name in files)))


def test_all_workers_together_are_no_more_than_the_cluster_has(tmp_path: Path) -> None:
    cluster = yaml.safe_load(CLUSTER_FILE.read_text()) | {"max_workers": 1}
    said = check_8b_on(tmp_path, cluster, 8)
    assert "8 on a node of type h100, of which there are up to 1\n" in said
    assert "of at most 16 replicas, 8 find room" in said
    with pytest.raises(ConfigError, match=r"9 replicas at least, and .* has room for 8"):
        check_8b_on(tmp_path, cluster, 9)
    # A second kind fits too, and takes fewer. Both kinds share what the cluster has.
    h100 = cluster["available_node_types"]["h100"]
    half = h100 | {"resources": {"CPU": 96, "GPU": 4, "accelerator_type:H100": 1}}
    cluster["available_node_types"] = {"half": half, **cluster["available_node_types"]}
    assert "of at most 16 replicas, 8 find room" in check_8b_on(tmp_path, cluster, 8)


def test_a_head_with_gpus_takes_replicas_too(tmp_path: Path) -> None:
    cluster = yaml.safe_load(CLUSTER_FILE.read_text())
    resources = {"CPU": 32, "GPU": 2, "accelerator_type:H100": 1}
    head = cluster["available_node_types"]["head"] | {"resources": resources}
    cluster |= {"available_node_types": {"head": head}, "max_workers": 0}
    assert "2 on a node of type head, of which there are up to 1\n" in check_8b_on(tmp_path, cluster, 2)
    with pytest.raises(ConfigError, match=r"3 replicas at least, and .* has room for 2"):
        check_8b_on(tmp_path, cluster, 3)


def test_hosts_whose_resources_nobody_says_are_not_refused() -> None:
    said = "\n".join(check_config(ROOT / "configs" / "qwen3-8b-h100.yaml", ROOT / "cluster" / "local.yaml"))
    assert "on nodes of type local.cluster.node, if they have that: " in said
    assert "of 79 GiB on one H100" in said


def test_nodes_whose_resources_nobody_says_may_take_what_others_can_not(tmp_path: Path) -> None:
    cluster = yaml.safe_load(CLUSTER_FILE.read_text())
    types = cluster["available_node_types"]
    types["h100"]["max_workers"] = 1
    types["found"] = types["h200"] | {"resources": {}}
    said = check_8b_on(tmp_path, cluster, 9)
    assert "8 on a node of type h100, of which there are up to 1\n" in said
    assert "more on nodes of type found, if they have that: " in said


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
