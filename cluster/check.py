"""`orthrus config check`: what a Serve config would place where, and whether it fits, before anything is started."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from orthrus.cache.kv_formats import kv_bytes_per_token
from orthrus.cluster.config import ClusterConfig, NodeType
from orthrus.deployments.access.keys import read_keys
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.config.app_args import AppArgs, DeploymentOptions
from orthrus.deployments.config.config_file import load_config
from orthrus.deployments.config.model_check import check_model, locate
from orthrus.deployments.config.placement import describe_resources, replica_demand
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import COPY_BYTES, auto_draft_format, copies_bytes, draft_format
from orthrus.engine.pass_limits import exchange_sizes
from orthrus.errors import ConfigError
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.hub import HubUnreachable
from orthrus.models.shapes import published_shape
from orthrus.models.shard import Shard
from orthrus.models.sizes import dtype_name, weight_bytes
from orthrus.schedules.registry import NGRAM, SCHEDULES

GIB = 1 << 30
GPU_GIB = {
    "A100": 39,
    "A100-80G": 79,
    "A10G": 22,
    "B200": 178,
    "H100": 79,
    "H200": 139,
    "L4": 22,
    "L40S": 44,
}
"""Memory that a process finds free, by Ray's accelerator type."""
FP8_GPUS = {"B200", "H100", "H200", "L4", "L40S"}
"""Those with FP8 matrix units."""
RESERVED_GIB = 2
"""For the CUDA context, kernels and activations."""


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
    if on_gpu and not nodes:
        raise ConfigError(
            f"args.replica.ray_actor_options: no node type of {cluster_path} has {describe_resources(demand)}: ask for less, or "
            "add a node type"
        )
    least, most = _replicas(args.replica)
    yield f"  replicas  {least if least == most else f'{least} to {most}'}, each {describe_resources(demand)}"
    if on_gpu:
        yield from _check_room(nodes, demand, least, most, cluster_path)
    else:
        yield "            on any node with room, this machine included"
    if model is not None:
        for memory in sorted({_gpu_memory(node) for node in nodes}) if on_gpu else [None]:
            yield f"  memory    {_memory(engine, model, memory)}"
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
    nodes: list[NodeType], demand: Mapping[str, float], least: int, most: int, cluster_path: Path
) -> Iterator[str]:
    """Which nodes take how many replicas. Raises ConfigError when the cluster never has room for the fewest."""
    room = 0
    for node in nodes:
        each = min(math.floor(node.resources[name] / amount) for name, amount in demand.items() if amount)
        room += each * node.max_workers
        yield f"            {each} on a node of type {node.name}, of which there are up to {node.max_workers}"
    if least > room:
        raise ConfigError(
            f"args.replica: {least} replicas at least, and {cluster_path} has room for {room}: lower "
            "autoscaling_config.min_replicas, or raise max_workers there"
        )
    if most > room:
        yield f"            of at most {most} replicas, {room} find room: max_workers of {cluster_path} is the limit"


def _gpu_memory(node: NodeType) -> tuple[float, str]:
    """GiB of one GPU of the node, and its kind. Raises ConfigError for a kind without a known size."""
    for name in node.resources:
        kind = name.removeprefix("accelerator_type:")
        if kind in GPU_GIB and kind != name:
            return GPU_GIB[kind], kind
    raise ConfigError(
        f"node type {node.name}: its resources name no accelerator of known memory: add one of "
        + ", ".join(f"accelerator_type:{kind}" for kind in sorted(GPU_GIB))
    )


def _memory(engine: EngineConfig, whole: ModelConfig, gpu: tuple[float, str] | None) -> str:
    """What the weights and the KV cache take. Raises ConfigError when a GPU can't hold all with one full context."""
    ranks = engine.tensor_parallel_size
    # The last rank's part is the largest. It has all of the embedding, and the head is counted as if it had all of that too.
    model = Shard(engine.with_settings(whole), ranks - 1, ranks).config
    dtype = dtype_name(engine.dtype, model, "cpu" if gpu is None else "cuda")
    lossless = engine.keeps_12_bits(model) and gpu is not None and dtype == "bfloat16"
    weights = weight_bytes(model, DTYPE_SIZES[dtype], lossless=lossless)
    position = kv_bytes_per_token(model, DTYPE_SIZES[dtype])
    context = engine.max_model_len or model.max_position_embeddings
    views = "two views" if model.has_diffusion else "AR view"
    copies = draft_format(engine, model)
    exchange = exchange_sizes(engine, model).layout(ranks)[1] if ranks > 1 else 0
    reserved = RESERVED_GIB * GIB + exchange
    if copies is None and gpu is not None and gpu[1] in FP8_GPUS and DTYPE_SIZES[dtype] == 2:
        memory = gpu[0] * engine.gpu_memory_utilization * GIB - reserved - weights
        copies = auto_draft_format(engine, model, DTYPE_SIZES[dtype], memory)
    if copies in COPY_BYTES:
        views = f"AR view, {copies} copies for drafts"
        weights += copies_bytes(model, DTYPE_SIZES[dtype], copies, lossless=lossless)
    if lossless:
        dtype = "bfloat16 in 12 bits"
    stored = dtype if lossless or model.quantization is None else f"{model.quantization.method} and {dtype}"
    each = "" if ranks == 1 else f" on each of {ranks}"
    said = f"weights {_gib(weights)}{each} ({views}, {stored})"
    if gpu is None:
        cache = engine.kv_cache_tokens
        return said + (f", KV cache {_gib(cache * position)} for {cache} tokens" if cache else "")
    size, kind = gpu
    said += f", {_gib(exchange)} for what they exchange" if exchange else ""
    free = size * engine.gpu_memory_utilization * GIB - reserved - weights
    tokens = engine.kv_cache_tokens or max(0, int(free / position))
    tokens = min(tokens, engine.kv_cache_tokens or context * engine.max_num_seqs)
    if tokens * position > free or tokens < context:
        room = max(0, int(free / position))
        raise ConfigError(
            f"args.engine: {said} and {_gib(max(tokens, context) * position)} of KV cache for {max(tokens, context)} "
            f"tokens don't fit the {size} GiB of one {kind}: "
            + (
                f"set max_model_len and kv_cache_tokens to {room} at most"
                if room
                else "take a larger GPU (ray_actor_options.accelerator_type) or a smaller model"
            )
        )
    return (
        f"{said}, KV cache {_gib(tokens * position)} for {tokens} tokens ({tokens / context:.1f} full contexts), "
        f"of {size} GiB on {'one' if ranks == 1 else 'each'} {kind}"
    )


def _drafts(engine: EngineConfig, model: ModelConfig) -> str:
    """Where drafts come from."""
    schedule = engine.schedule_for(model)
    sources: list[str] = []
    if SCHEDULES[schedule].needs_diffusion:
        sources.append(f"diffusion blocks of up to {engine.draft_length or model.block_size} rows")
    if SCHEDULES[schedule].needs_medusa:
        sources.append(f"the Medusa heads in {engine.medusa_heads or 'the model'}")
    if NGRAM in engine.request_schedules(model):
        lengths = f"{engine.prompt_lookup_min} to {engine.prompt_lookup_max}"
        sources.append(f"n-grams of {lengths} tokens, looked up in prompt and text")
    return f"{' and '.join(sources) or 'none'} (schedule {schedule})"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
