"""Waits until Serve's proxies pass requests on. They learn of an application a moment after it runs."""

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
"""After this time a proxy counts as ready. It may have TLS, which is not spoken here."""
_PAUSE_SECONDS = 0.1


def wait_for_proxies(config: ServeDeploySchema, models: Mapping[str, str]) -> None:
    """Wait until HTTP and gRPC of this machine lead to every application, or for some seconds.

    models: the name of each application's model.
    """
    host = config.http_options.host
    host = "127.0.0.1" if host in (None, "0.0.0.0", "::") else host
    end = time.monotonic() + _LONGEST_SECONDS
    for app in config.applications:
        root = f"http://{host}:{config.http_options.port}{(app.route_prefix or '').rstrip('/')}"
        _wait(partial(_http_answers, root), end)
    if serves_grpc(config):
        with grpc.insecure_channel(f"{host}:{config.grpc_options.port}") as channel:
            for app, model in models.items():
                _wait(partial(_grpc_answers, OrthrusStub(channel), app, model), end)


def _wait(answers: Callable[[], bool], end: float) -> None:
    while not answers() and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)


def _http_answers(root: str) -> bool:
    """Whether an application answers, and not Serve in its place."""
    try:
        with urllib.request.urlopen(f"{root}/v1/models", timeout=5.0):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (404, 502, 503)
    except OSError:
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
