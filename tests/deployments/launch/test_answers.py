"""`orthrus serve` says that it is ready once Serve's proxies know the application: before, they answer in its place."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from ray.serve.schema import ServeDeploySchema

from orthrus.deployments.launch.answers import wait_for_proxies
from orthrus.deployments.proto import orthrus_pb2 as pb
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusServicer, add_OrthrusServicer_to_server

ASKED: list[str] = []
"""What was asked: "http" and "grpc"."""


class Proxy(BaseHTTPRequestHandler):
    """Knows the application from the third request on."""

    def do_GET(self) -> None:
        ASKED.append("http")
        self.send_response(200 if ASKED.count("http") > 2 else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class RpcProxy(OrthrusServicer):
    """The same for gRPC."""

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        ASKED.append("grpc")
        assert ("application", "app") in tuple(context.invocation_metadata()) and request.model == "m"
        known = ASKED.count("grpc") > 2
        context.set_code(grpc.StatusCode.INVALID_ARGUMENT if known else grpc.StatusCode.NOT_FOUND)
        return pb.GenerateResponse()


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    ASKED.clear()
    web = HTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    rpc = grpc.server(ThreadPoolExecutor(1))
    add_OrthrusServicer_to_server(RpcProxy(), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    try:
        yield web.server_port, port
    finally:
        rpc.stop(None)
        web.shutdown()
        web.server_close()
        thread.join()


def test_waits_until_both_proxies_know_the_application(ports: tuple[int, int]) -> None:
    config = ServeDeploySchema.model_validate(
        {
            "http_options": {"host": "127.0.0.1", "port": ports[0]},
            "grpc_options": {
                "port": ports[1],
                "grpc_servicer_functions": ["orthrus.deployments.grpc_service.add_to_server"],
            },
            "applications": [{"name": "app", "route_prefix": "/", "import_path": "a:b"}],
        }
    )
    wait_for_proxies(config, {"app": "m"})
    assert ASKED == ["http"] * 3 + ["grpc"] * 3
