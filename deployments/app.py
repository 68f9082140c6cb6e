"""Makes the Serve application from the `args` of a config whose `import_path` is `orthrus.deployments.app:build`."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.serve import Application, Deployment, deployment

from orthrus.deployments.access.rate_limits import RateLimiter
from orthrus.deployments.config.app_args import OUR_ROUTER, parse_args
from orthrus.deployments.config.model_check import check_model, locate
from orthrus.deployments.config.placement import check_placement
from orthrus.deployments.ingress.ingress import Ingress
from orthrus.deployments.replica.replica import OrthrusReplica
from orthrus.deployments.responses.store import ResponseStore
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.models.hub import HubUnreachable

ROUTER = {"request_router_class": OUR_ROUTER, "request_routing_stats_period_s": 1.0}
"""The replicas' request router, as far as the config says nothing else of it."""
HEALTH_CHECK_SECONDS = 2.0
"""Period of Serve's health checks: how soon it notices a lost replica and starts another one."""
DRAIN_SECONDS = 300.0
"""How long a replica or an ingress that is being removed may finish its running requests. It gets no new ones."""
MAX_QUEUED = 512
"""Most requests that wait in one ingress for a replica, or in one proxy for an ingress. Further ones are refused."""
BUSY = {"status_code": 429, "retry_after_s": 1}
"""The answer to a request that finds `MAX_QUEUED` requests waiting."""


def build(args: dict[str, Any]) -> Application:
    """The application that the args describe.

    Raises ConfigError if the args are invalid, if the model can't be served with them, or if no node of the cluster can take a
    replica. The message names the key and says what is wrong.
    """
    return make_application(args, Engine.from_pretrained)


def make_application(args: dict[str, Any], load: Callable[[EngineConfig], Engine]) -> Application:
    """The same as `build`, but `load` makes the engine of each replica."""
    checked = parse_args(args)
    if ray.is_initialized():
        check_placement(checked.replica)
    engine = locate(checked.engine)
    with suppress(HubUnreachable):  # Not from this node; the replicas find out.
        check_model(engine)
    options = dict(args.get("replica", {}))
    # The config may give a setting of the router, and no class.
    options["request_router_config"] = ROUTER | options.get("request_router_config", {})
    replica = _deployment(
        OrthrusReplica,
        options,
        # Serve's default of 5 concurrent requests would starve the engine's batch.
        max_ongoing_requests=engine.max_num_seqs,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        max_queued_requests=MAX_QUEUED,
        backpressure_config=BUSY,
    ).bind(engine, load)
    # One replica of each, because it keeps state for all ingress replicas. Serve starts another if it is lost.
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
        max_surge_percent=100,  # An update starts new ones before old ones end.
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,  # A stream goes through it as long as the replica answers.
        max_queued_requests=MAX_QUEUED,
        backpressure_config=BUSY,
    ).bind(replica, engine, checked.api, limiter, responses)


def _deployment(deployment: Any, options: Mapping[str, Any], **defaults: Any) -> Deployment:
    """`deployment` with `options`, else `defaults`. Typed Any, because type checkers don't understand Serve's decorator."""
    return deployment.options(**{**defaults, **options})
