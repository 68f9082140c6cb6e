"""`build`: from the `args` of a Serve config to the application. `import_path: deployments.app:build`."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application, Deployment

from deployments.ingress import Ingress
from deployments.replica import OrthrusReplica
from orthrus.engine_config import EngineConfig

ROUTER = {"request_router_class": "deployments.router.PrefixRouter", "request_routing_stats_period_s": 1.0}
"""The replicas' request router where the config names none."""
DRAIN_SECONDS = 300.0
"""A replica that is scaled away or updated may go on answering for this long; it gets nothing new meanwhile."""

_ROOT = Path(__file__).resolve().parent.parent


class DeploymentArgs(BaseModel):
    """Serve's own deployment options, passed on as they are (num_replicas, autoscaling_config, ray_actor_options, ...)."""

    model_config = ConfigDict(extra="allow")


class AppArgs(BaseModel):
    """An application: one model, its replicas and the ingress in front of them. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    engine: EngineConfig
    replica: DeploymentArgs = Field(default_factory=DeploymentArgs)
    ingress: DeploymentArgs = Field(default_factory=DeploymentArgs)


def build(args: dict[str, Any]) -> Application:
    """The application that the args describe; raises pydantic's ValidationError, which names key and fault.

    A model path that exists below the project is taken from there, so that a config works from any directory.
    """
    parsed = AppArgs.model_validate(args)
    engine = parsed.engine
    local = _ROOT / engine.model
    if local.is_dir():
        name = engine.served_model_name or local.name
        engine = engine.model_copy(update={"model": str(local), "served_model_name": name})
    replica = _deployment(
        OrthrusReplica,
        parsed.replica,
        # Serve's default of 5 concurrent requests would starve the engine's batch.
        max_ongoing_requests=engine.max_num_seqs,
        request_router_config=ROUTER,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    ).bind(engine)
    return _deployment(Ingress, parsed.ingress, max_ongoing_requests=1024).bind(replica, engine)


def _deployment(deployment: Any, args: DeploymentArgs, **defaults: Any) -> Deployment:
    """The deployment with its options; the decorator's type is lost to the type checker, hence Any."""
    return deployment.options(**{**defaults, **args.model_dump()})
