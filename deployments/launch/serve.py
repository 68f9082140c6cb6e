"""Deploy a Serve config from the command line: what `orthrus serve CONFIG` runs."""

import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState, ServeDeploySchema

from orthrus.deployments.config.app_args import AppArgs
from orthrus.deployments.config.config_file import load_config, serves_grpc
from orthrus.deployments.config.model_check import check_model, locate
from orthrus.deployments.launch.answers import wait_for_proxies
from orthrus.deployments.launch.environment import set_environment
from orthrus.deployments.launch.ports import check_ports
from orthrus.deployments.replica.stages import read_stages
from orthrus.errors import ConfigError

Tell = Callable[[str], object]
"""A function that is given what is under way, in a few words."""

_ROOT = Path(__file__).resolve().parents[2]


def serve_config(path: Path, *, address: str | None = None, tell: Tell = lambda what: None) -> None:
    """Deploy `path` on the Ray cluster at `address`, or on one started here, and wait until it answers.

    tell: called again and again with what is waited for. What was started here ends with this process, or with Ray's own
    shutdown. Raises ConfigError for a config that can't work, and if its deployment fails.
    """
    tell(f"Reading {path}")
    config, apps = load_config(path)
    if address is None:
        # Checked before anything starts. On another cluster, `build` checks the models.
        check_ports(config)
        _check_models(path, apps, tell)
    _start_ray(address, tell)
    try:
        _deploy(config, tell)
        if address is None:
            wait_for_proxies(config, {name: _model_name(args) for name, args in apps.items()})
    except BaseException:
        if address is None:
            serve.shutdown()
            ray.shutdown()
        raise
    _print_endpoints(config, apps)


def _check_models(path: Path, apps: dict[str, AppArgs], tell: Tell) -> None:
    """Raise ConfigError for a model that the replicas, on this machine, could not load."""
    for name, args in apps.items():
        tell(f"Checking the model {args.engine.model}")
        try:
            check_model(locate(args.engine))
        except ConfigError as error:
            raise ConfigError(f"{path}: application {name}: {error}") from error


def _start_ray(address: str | None, tell: Tell) -> None:
    """Connect to the Ray at `address`, or start Ray here. Of Ray's messages, only errors are shown in the terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    environment = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
    if address is not None:
        tell(f"Connecting to Ray at {address}")
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        return
    tell("Starting Ray")
    set_environment()
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        runtime_env=environment,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _deploy(config: ServeDeploySchema, tell: Tell) -> None:
    """Start Serve's proxies and the applications, and wait for them. Raises ConfigError with what went wrong."""
    tell("Starting Ray Serve")
    try:
        serve.start(
            proxy_location=config.proxy_location,
            http_options=config.http_options.model_dump(),
            grpc_options=config.grpc_options.model_dump(),
            logging_config=config.logging_config,
            tracing_config=config.tracing_config,
            controller_options=config.controller_options,
        )
    except RuntimeError as error:
        raise ConfigError(f"Ray Serve can't start: {_last_line(str(error))}") from error
    _get_global_client().deploy_apps(config)
    _wait_until_running([app.name for app in config.applications], tell)


def _wait_until_running(names: list[str], tell: Tell) -> None:
    """Poll until all applications run. Raises ConfigError with what Serve and the deployments say if one fails."""
    while True:
        status = serve.status().applications
        apps = {name: status.get(name) for name in names}
        for app in apps.values():
            if app is not None and app.status in (
                ApplicationStatus.DEPLOY_FAILED,
                ApplicationStatus.UNHEALTHY,
            ):
                # Each message ends with the exception that a replica died of, after its stack.
                causes = {_last_line(deployment.message) for deployment in app.deployments.values()}
                said = "; ".join(sorted(causes - {""})) or _last_line(app.message)
                raise ConfigError(f"the deployment failed: {said}")
        if all(app is not None and app.status is ApplicationStatus.RUNNING for app in apps.values()):
            return
        tell("; ".join(_describe(name, app) for name, app in apps.items()))
        time.sleep(0.2)


def _describe(name: str, app: ApplicationStatusOverview | None) -> str:
    """What an application that does not run yet is waiting for, from Serve's status and what its replicas say."""
    if app is None or not app.deployments:
        return f"{name}: building the application"
    parts = []
    for deployment, state in app.deployments.items():
        running = state.replica_states.get(ReplicaState.RUNNING, 0)
        if running:
            continue
        starting = state.replica_states.get(ReplicaState.STARTING, 0)
        parts.append(f"{deployment}: starting" if starting else f"{deployment}: waiting for a place")
    return f"{name}: " + ", ".join([*parts, *read_stages(name)] or ["almost ready"])


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _model_name(args: AppArgs) -> str:
    """The name of an application's model in requests."""
    engine = locate(args.engine)
    return engine.served_model_name or engine.model


def _print_endpoints(config: ServeDeploySchema, apps: dict[str, AppArgs]) -> None:
    """Where to send requests, and one to try."""
    port = config.http_options.port
    rpc = f"   gRPC: localhost:{config.grpc_options.port}" if serves_grpc(config) else ""
    for app in config.applications:
        if app.name not in apps:
            continue
        name = _model_name(apps[app.name])
        root = f"http://localhost:{port}{(app.route_prefix or '').rstrip('/')}"
        url, page = f"{root}/v1", f"   page: {root}/" if apps[app.name].api.page else ""
        print(f"""Ready. {name}: OpenAI API at {url}{rpc}{page}
Try:
  curl -N {url}/completions -H 'Content-Type: application/json' -d '{{"model": "{name}",
    "prompt": "def load_config(path):\\n", "max_tokens": 64, "temperature": 0, "stream": true}}'
""")
    print("Ctrl-C ends it.", flush=True)
