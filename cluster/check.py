"""`orthrus config check`: says where a Serve config would place replicas, and whether they fit, before anything is started."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from orthrus.cluster.config import ClusterConfig, NodeType
from orthrus.cluster.memory import GPUS, describe_memory
from orthrus.deployments.access.keys import read_keys
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.config.app_args import AppArgs, DeploymentOptions
from orthrus.deployments.config.config_file import load_config
from orthrus.deployments.config.model_check import check_model, find_medusa, locate
from orthrus.deployments.config.placement import describe_resources, replica_demand
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.models.hub import HubUnreachable
from orthrus.models.shapes import published_shape
from orthrus.schedules.registry import NGRAM, SCHEDULES


def check_config(path: Path, cluster_path: Path) -> Iterator[str]:
    """Lines that say what `path` would place on the cluster of `cluster_path`. Raises ConfigError at what can't work."""
    config, apps = load_config(path)
    cluster = ClusterConfig.load(cluster_path)
    for app in config.applications:
        args = apps.get(app.name)
        if args is None:
            yield f"application {app.name}: not one of ours, not checked"
            continue
        try:
            yield from _check_app(
                f"application {app.name} at {app.route_prefix}", args, cluster, cluster_path
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: application {app.name}: {error}") from error


def _check_app(title: str, args: AppArgs, cluster: ClusterConfig, cluster_path: Path) -> Iterator[str]:
    engine = locate(args.engine)
    model: ModelConfig | None
    try:
        model, source = check_model(engine, load=False), "config.json"
    except HubUnreachable:
        model, source = published_shape(engine.model), "the published shape, the hub can't be reached"
        if model is not None:
            engine.check_model(model)
    yield f"{title}: {engine.served_model_name or engine.model}"
    yield f"  model     {engine.model} ({source if model else 'unknown: the hub cannot be reached'})"
    demand = replica_demand(args.replica)
    on_gpu = "GPU" in demand
    nodes = cluster.placements(demand) if on_gpu else []
    if on_gpu and not nodes and not cluster.undescribed:
        raise ConfigError(
            f"args.replica.ray_actor_options: no node type of {cluster_path} has {describe_resources(demand)}: ask for less, or "
            "add a node type"
        )
    least, most = _replicas(args.replica)
    yield f"  replicas  {least if least == most else f'{least} to {most}'}, each {describe_resources(demand)}"
    if nodes:
        yield from _check_room(cluster, demand, least, most, cluster_path)
    elif on_gpu:
        names = " or ".join(node.name for node in cluster.undescribed)
        yield f"            on nodes of type {names}, if they have that: {cluster_path} does not say"
    else:
        yield "            on any node with room, this machine included"
    if model is not None:
        medusa = find_medusa(engine, model)
        for kind in _gpu_kinds(nodes, demand) if on_gpu else [None]:
            yield f"  memory    {describe_memory(engine, model, kind, medusa)}"
        yield f"  drafts    {_drafts(engine, model)}"
    least, most = _replicas(args.ingress)
    yield (
        f"  ingress   {least if least == most else f'{least} to {most}'}, each {describe_resources(replica_demand(args.ingress))}"
    )
    yield f"  api       {_callers(args.api)}"


def _callers(api: ApiConfig) -> str:
    """Who may call. Raises ConfigError for a keys file that is here and can't be used."""
    if api.keys_file is None:
        return (
            f"keys in environment variable {api.keys_env}" if api.keys_env else "open to whoever reaches it"
        )
    if not api.keys_file.exists():
        return f"keys in {api.keys_file}, which is not on this machine"
    keys = read_keys(api.keys_file).values()
    return f"{len(keys)} keys in {api.keys_file}, {sum(key.expired for key in keys)} of them expired"


def _replicas(options: DeploymentOptions) -> tuple[int, int]:
    """Fewest and most replicas."""
    scaling = options.autoscaling_config
    if scaling is not None:
        return scaling.min_replicas, scaling.max_replicas
    count = options.num_replicas if isinstance(options.num_replicas, int) else 1
    return count, count


def _check_room(
    cluster: ClusterConfig, demand: Mapping[str, float], least: int, most: int, cluster_path: Path
) -> Iterator[str]:
    """Which nodes take how many replicas. Raises ConfigError when the cluster never has room for the fewest."""
    room, workers = 0, cluster.max_workers
    sized = [
        (min(math.floor(node.resources[name] / amount) for name, amount in demand.items() if amount), node)
        for node in cluster.placements(demand)
    ]
    for each, node in sized:
        is_head = node is cluster.head  # It comes on top of the workers.
        count = min(node.max_workers, cluster.max_workers) + is_head
        yield f"            {each} on a node of type {node.name}, of which there are up to {count}"
        room += each * is_head
    # At most, if all workers are of the kinds that take most.
    for each, node in sorted(sized, key=lambda one: one[0], reverse=True):
        count = min(node.max_workers, workers)
        room, workers = room + each * count, workers - count
    if cluster.undescribed:
        names = " or ".join(node.name for node in cluster.undescribed)
        yield f"            more on nodes of type {names}, if they have that: {cluster_path} does not say"
        return
    if least > room:
        raise ConfigError(
            f"args.replica: {least} replicas at least, and {cluster_path} has room for {room}: lower "
            "autoscaling_config.min_replicas, or raise max_workers there"
        )
    if most > room:
        yield f"            of at most {most} replicas, {room} find room: max_workers of {cluster_path} is the limit"


def _gpu_kinds(nodes: list[NodeType], demand: Mapping[str, float]) -> list[str]:
    """The kinds of GPUs that replicas may run on. nodes: that take them; if none is known, what the replicas ask for counts."""
    if nodes:
        return sorted({_gpu_kind(node) for node in nodes})
    kind = _known_kind(demand)
    return [] if kind is None else [kind]


def _known_kind(resources: Mapping[str, float]) -> str | None:
    """The kind of GPU among `resources`, a key of `GPUS`."""
    kinds = (name.removeprefix("accelerator_type:") for name in resources if ":" in name)
    return next((kind for kind in kinds if kind in GPUS), None)


def _gpu_kind(node: NodeType) -> str:
    """The kind of the node's GPUs, a key of `GPUS`. Raises ConfigError for a kind without a known size."""
    kind = _known_kind(node.resources)
    if kind is not None:
        return kind
    raise ConfigError(
        f"node type {node.name}: its resources name no accelerator of known memory: add one of "
        + ", ".join(f"accelerator_type:{kind}" for kind in sorted(GPUS))
    )


def _drafts(engine: EngineConfig, model: ModelConfig) -> str:
    """Where drafts come from."""
    schedule = engine.schedule_for(model)
    sources: list[str] = []
    if SCHEDULES[schedule].needs_diffusion:
        sources.append(f"diffusion blocks of up to {engine.draft_length or model.block_size} rows")
    if SCHEDULES[schedule].needs_medusa:
        folder = engine.medusa_folder(Path(engine.model))
        where = (
            ""
            if folder is not None and folder.is_dir()
            else ", not on this machine and not counted in memory"
        )
        sources.append(f"the Medusa heads in {folder}{where}")
    if NGRAM in engine.request_schedules(model):
        lengths = f"{engine.prompt_lookup_min} to {engine.prompt_lookup_max}"
        sources.append(f"n-grams of {lengths} tokens, looked up in prompt and text")
    return f"{' and '.join(sources) or 'none'} (schedule {schedule})"
