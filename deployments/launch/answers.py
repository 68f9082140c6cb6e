"""Waits until Serve's proxies pass requests on. They learn of an application a moment after it runs."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial

import grpc
from ray.serve.schema import ServeDeploySchema

from orthrus.deployments.config.config_file import serves_grpc
from orthrus.deployments.proto.orthrus_pb2 import GenerateRequest
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub

_LONGEST_SECONDS = 20.0
"""After this time a proxy counts as ready."""
_PAUSE_SECONDS = 0.1
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses of this machine, which `http_proxy` in the environment is not for."""


def wait_for_proxies(config: ServeDeploySchema, models: Mapping[str, str]) -> None:
    """Wait until HTTP and gRPC of this machine lead to the applications in `models`, or for some seconds.

    models: the name of each application's model. HTTPS is not waited for, nor applications without a route.
    """
    host = config.http_options.host
    host = "127.0.0.1" if host in (None, "0.0.0.0", "::") else host
    end = time.monotonic() + _LONGEST_SECONDS
    for app in config.applications:
        if app.name in models and app.route_prefix is not None and config.http_options.ssl_certfile is None:
            root = f"http://{host}:{config.http_options.port}{app.route_prefix.rstrip('/')}"
            _wait(partial(_http_answers, root), end)
    if serves_grpc(config):
        address = f"{host}:{config.grpc_options.port}"
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            for name, model in models.items():
                _wait(partial(_grpc_answers, OrthrusStub(channel), name, model), end)


def _wait(answers: Callable[[], bool], end: float) -> None:
    while not answers() and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)


def _http_answers(root: str) -> bool:
    """Whether an application answers, and not Serve in its place."""
    try:
        with _DIRECTLY.open(f"{root}/v1/models", timeout=5.0):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (404, 502, 503)
    except (OSError, http.client.HTTPException):
        return False


def _grpc_answers(stub: OrthrusStub, app: str, model: str) -> bool:
    """Whether the application refuses a request without a prompt. Before, the proxy does not find the application."""
    try:
        stub.Generate(GenerateRequest(model=model), timeout=5.0, metadata=(("application", app),))
    except grpc.RpcError as error:
        return error.code() not in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
    return True
