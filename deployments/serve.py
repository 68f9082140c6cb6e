"""Deploy a Serve config from the command line and stay with it: what `orthrus serve CONFIG` runs."""

import signal
import threading
import time
from pathlib import Path

import ray
import yaml
from pydantic import ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import (
    ApplicationStatus,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
    gRPCOptionsSchema,
)

from deployments.app_args import AppArgs, parse_args
from deployments.config_faults import describe_faults
from deployments.environment import set_environment
from deployments.model_check import check_model, locate
from orthrus.engine_config import EngineConfig
from orthrus.errors import ConfigError

_ROOT = Path(__file__).resolve().parent.parent


class _HTTPOptions(HTTPOptionsSchema):
    model_config = ConfigDict(extra="forbid")


class _GRPCOptions(gRPCOptionsSchema):
    model_config = ConfigDict(extra="forbid")


class _Application(ServeApplicationSchema):
    model_config = ConfigDict(extra="forbid")


class _Config(ServeDeploySchema):
    """Serve's schema, which for its own reasons lets unknown keys pass, without that leniency."""

    model_config = ConfigDict(extra="forbid")

    http_options: _HTTPOptions = Field(default_factory=_HTTPOptions)
    grpc_options: _GRPCOptions = Field(default_factory=_GRPCOptions)
    applications: list[_Application]


def load_config(path: Path) -> tuple[ServeDeploySchema, dict[str, AppArgs]]:
    """A Serve config file and the args of our applications in it by application name, all checked but for the models.

    Raises ConfigError with a line for each fault: the file, the path in it and what to change.
    """
    try:
        given = yaml.safe_load(path.read_text())
        _Config.model_validate(given)
        config = ServeDeploySchema.model_validate(given)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise _located(path, describe_faults(error, _Config)) from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a Serve config: {error}") from error
    args: dict[str, AppArgs] = {}
    faults: list[str] = []
    for index, app in enumerate(config.applications):
        if app.import_path != "deployments.app:build":
            continue
        where = f"applications[{index}]"
        if app.deployments:
            faults.append(
                f"{where}.deployments: options go under args.replica and args.ingress: move them there"
            )
        try:
            args[app.name] = parse_args(app.args, f"{where}.args")
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise _located(path, "\n".join(faults))
    return config, args


def _located(path: Path, faults: str) -> ConfigError:
    return ConfigError("\n".join(f"{path}: {fault}" for fault in faults.splitlines()))


def serve_config(path: Path, *, address: str | None = None, blocking: bool = True) -> None:
    """Deploy `path` on the Ray cluster at `address`, or on one started here, and wait until it answers.

    blocking: stay until SIGINT or SIGTERM, then end what was started here (a cluster at `address` keeps serving).
    Raises ConfigError for a config that can't work, its deployment's error included.
    """
    config, apps = load_config(path)
    if address is None:
        # Before anything is started; elsewhere, `build` does it on the cluster.
        for args in apps.values():
            check_model(locate(args.engine))
        set_environment()
    environment = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
    if address is None:
        ray.init(address="local", include_dashboard=False, runtime_env=environment, log_to_driver=False)
    else:
        ray.init(address=address, runtime_env=environment)
    running = False
    try:
        _deploy(config)
        running = True
        _print_endpoints(config)
        if blocking:
            _wait_for_signal()
    finally:
        if address is None and (blocking or not running):
            serve.shutdown()
            ray.shutdown()


def _deploy(config: ServeDeploySchema) -> None:
    """Start Serve's proxies and the applications, and wait for them. Raises ConfigError with what went wrong."""
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
    _wait_until_running([app.name for app in config.applications])


def _wait_until_running(names: list[str]) -> None:
    """Poll until all applications run. Raises ConfigError with what Serve and the deployments say if one fails."""
    while True:
        apps = [serve.status().applications.get(name) for name in names]
        for app in apps:
            if app is not None and app.status in (
                ApplicationStatus.DEPLOY_FAILED,
                ApplicationStatus.UNHEALTHY,
            ):
                # Each message ends with the exception that a replica died of, after its stack.
                causes = {_last_line(deployment.message) for deployment in app.deployments.values()}
                said = "; ".join(sorted(causes - {""})) or _last_line(app.message)
                raise ConfigError(f"the deployment failed: {said}")
        if all(app is not None and app.status is ApplicationStatus.RUNNING for app in apps):
            return
        time.sleep(0.2)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def _print_endpoints(config: ServeDeploySchema) -> None:
    """Where to send requests, and one to try."""
    ours = [app for app in config.applications if "engine" in app.args]
    model = locate(EngineConfig.model_validate(ours[0].args["engine"])).served_model_name if ours else None
    port = config.http_options.port
    print(f"Ready. OpenAI API: http://localhost:{port}/v1   gRPC: localhost:{config.grpc_options.port}\n")
    if model is not None:
        print("Try:")
        print(f"""  curl -N http://localhost:{port}/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "prompt": "def load_config(path):\\n", "max_tokens": 64, "temperature": 0, "stream": true}}'""")
    print("\nCtrl-C ends it.", flush=True)
