"""Checks that a running Ray cluster has a node for a replica. Without one, the replica would wait for ever, without an error."""

from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state

from orthrus.deployments.config.app_args import DeploymentOptions
from orthrus.errors import ConfigError

Resources = Mapping[str, float]
"""Ray's names of resources ("CPU", "GPU", "accelerator_type:H100"), and how much there is of each."""


def check_placement(options: DeploymentOptions) -> None:
    """Raise ConfigError if no node of the cluster that this process belongs to can ever take a replica with these options.

    Only replicas with GPUs are checked. Nothing is raised if the cluster has no GPU node yet, since it may still get one, or if
    its autoscaler may add a kind of node that fits.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    groups = [dict(group.resources) for group in config.node_group_configs] if config is not None else []
    check_room(replica_demand(options), nodes, groups)


def check_room(demand: Resources, nodes: Iterable[Resources], groups: Iterable[Resources]) -> None:
    """The check of `check_placement`. demand: a replica's. nodes: of each node, all that it has. groups: of each kind of node
    that may be added, the same.
    """
    with_gpus = [node for node in nodes if node.get("GPU")]
    if "GPU" not in demand or not with_gpus or any(fits(demand, node) for node in (*with_gpus, *groups)):
        return
    names = [name for name in demand if not _is_kind(name)]
    found = {
        describe_resources(
            {name: node.get(name, 0) for name in names} | {kind: 1 for kind in node if _is_kind(kind)}
        )
        for node in with_gpus
    }
    raise ConfigError(
        f"args.replica.ray_actor_options: a replica must have {describe_resources(demand)} on one node, and no node of the "
        f"cluster has that. Those with GPUs have {'; or '.join(sorted(found))}. Ask for less, or add a node"
    )


def fits(demand: Resources, node: Resources) -> bool:
    """Whether an empty node has room for `demand`."""
    return all(node.get(name, 0) >= amount for name, amount in demand.items())


def replica_demand(options: DeploymentOptions) -> dict[str, float]:
    """Resources that each replica of a deployment asks for."""
    return actor_demand(options.ray_actor_options.model_dump(exclude_unset=True))


def actor_demand(options: Mapping[str, Any]) -> dict[str, float]:
    """Resources that Serve's `ray_actor_options` ask for. Serve's default is one CPU."""
    cpus = options.get("num_cpus")  # None: the default.
    demand: dict[str, float] = {"CPU": 1 if cpus is None else cpus, **options.get("resources", {})}
    if options.get("num_gpus"):
        demand["GPU"] = options["num_gpus"]
    if options.get("accelerator_type"):
        # Ray's own way to bind an actor to a kind of accelerator: it asks for a tiny part of a resource that such nodes have.
        demand[f"accelerator_type:{options['accelerator_type']}"] = 0.001
    return demand


def describe_resources(resources: Resources) -> str:
    """The resources in words, such as "4 CPU, 1 GPU, H100"."""
    return ", ".join(
        name.partition(":")[2] if _is_kind(name) else f"{amount:g} {name}"
        for name, amount in resources.items()
    )


def _is_kind(name: str) -> bool:
    return name.startswith("accelerator_type:")
