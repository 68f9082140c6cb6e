"""What `ray_cluster.yaml` describes: node types and what fits on them, checked before `ray up` costs anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from orthrus.deployments.config.placement import fits
from orthrus.errors import ConfigError
from orthrus.yaml_file import read_yaml


@dataclass(frozen=True)
class NodeType:
    """One kind of node. `resources`: Ray's names ("CPU", "GPU", "accelerator_type:H100") and amounts of one node."""

    name: str
    resources: Mapping[str, float]
    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class ClusterConfig:
    """A cluster: its head and the kinds of workers that its autoscaler may add, `max_workers` in all."""

    name: str
    head: NodeType
    workers: tuple[NodeType, ...]
    max_workers: int

    @classmethod
    def load(cls, path: Path) -> "ClusterConfig":
        """Read a cluster launcher file, checked as `ray up` checks it. Raises ConfigError with file and fault."""
        given = read_yaml(path).data
        try:
            if not isinstance(given, dict) or "provider" not in given:
                raise ValueError("no provider: is it a cluster launcher file?")
            config = prepare_config(given)
            validate_config(config)
        except ValidationError as error:
            raise ConfigError(f"{path}: {error.json_path}: {error.message}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        head = config["head_node_type"]
        types = {name: _node_type(name, node) for name, node in config["available_node_types"].items()}
        workers = tuple(node for name, node in types.items() if name != head and node.max_workers)
        return cls(config["cluster_name"], types[head], workers, config["max_workers"])

    @property
    def undescribed(self) -> list[NodeType]:
        """The kinds of nodes whose resources the file does not say: Ray finds them when such a node starts."""
        return [node for node in (self.head, *self.workers) if not node.resources]

    def placements(self, demand: Mapping[str, float]) -> list[NodeType]:
        """The kinds of nodes that an actor with this demand can run on; empty if it would wait forever."""
        return [node for node in (self.head, *self.workers) if fits(demand, node.resources)]


def _node_type(name: str, node: Mapping[str, Any]) -> NodeType:
    return NodeType(name, node.get("resources", {}), node["min_workers"], node["max_workers"])
