"""`build`: from the `args` of a Serve config to the application. `import_path: orthrus.deployments.app:build`."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.serve import Application, Deployment, deployment

from orthrus.deployments.access.rate_limits import RateLimiter
from orthrus.deployments.config.app_args import parse_args
from orthrus.deployments.config.model_check import check_model, locate
from orthrus.deployments.config.placement import check_placement
from orthrus.deployments.ingress.ingress import Ingress
from orthrus.deployments.replica.replica import OrthrusReplica
from orthrus.deployments.responses.store import ResponseStore
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.models.hub import HubUnreachable

ROUTER = {
    "request_router_class": "orthrus.deployments.router.PrefixRouter",
    "request_routing_stats_period_s": 1.0,
}
"""The replicas' request router where the config names none."""
HEALTH_CHECK_SECONDS = 2.0
"""How soon a replica that is gone is noticed, and replaced."""
DRAIN_SECONDS = 300.0
"""A replica that is scaled away or updated may go on answering for this long; it gets nothing new meanwhile."""
MAX_QUEUED = 512
"""Requests that wait, in one ingress for a replica or in one proxy for an ingress; the next is refused."""
BUSY = {"status_code": 429, "retry_after_s": 1}
"""How a request is refused that would have to queue behind `MAX_QUEUED`."""


def build(args: dict[str, Any]) -> Application:
    """The application that the args describe.

    Raises ConfigError, naming key and fault, if they or the model can't work, or if no node of the cluster can take a replica.
    """
    return make_application(args, Engine.from_pretrained)


def make_application(args: dict[str, Any], load: Callable[[EngineConfig], Engine]) -> Application:
    """`build`, whose replicas get their engines from `load`."""
    checked = parse_args(args)
    if ray.is_initialized():
        check_placement(checked.replica)
    engine = locate(checked.engine)
    with suppress(HubUnreachable):  # From the head node; the replicas will see.
        check_model(engine)
    replica = _deployment(
        OrthrusReplica,
        args.get("replica", {}),
        # Serve's default of 5 concurrent requests would starve the engine's batch.
        max_ongoing_requests=engine.max_num_seqs,
        request_router_config=ROUTER,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        max_queued_requests=MAX_QUEUED,
        backpressure_config=BUSY,
    ).bind(engine, load)
    # One of each, since it counts or keeps for all: Serve starts another if it is lost.
    single: dict[str, Any] = {
        "num_replicas": 1,
        "max_ongoing_requests": 4096,
        "ray_actor_options": {"num_cpus": 0},
    }
    limiter = deployment(RateLimiter, **single).bind() if checked.api.has_keys else None
    store = checked.api.response_store
    responses = deployment(ResponseStore, **single).bind(store) if store is not None else None
    return _deployment(
        Ingress,
        args.get("ingress", {}),
        max_ongoing_requests=1024,
        max_surge_percent=100,  # An update starts the new ones first: they need no GPU.
        health_check_period_s=HEALTH_CHECK_SECONDS,
        max_queued_requests=MAX_QUEUED,
        backpressure_config=BUSY,
    ).bind(replica, engine, checked.api, limiter, responses)


def _deployment(deployment: Any, options: Mapping[str, Any], **defaults: Any) -> Deployment:
    """The deployment with its options; the decorator's type is lost to the type checker, hence Any."""
    return deployment.options(**{**defaults, **options})
