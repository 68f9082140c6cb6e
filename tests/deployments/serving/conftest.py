"""One running Serve application for all tests of this folder: its start takes long. It ends with the folder's last test."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
import ray
import yaml
from ray import serve

from orthrus.deployments.launch.environment import free_port
from orthrus.deployments.launch.serve import serve_config
from orthrus.deployments.proto.orthrus_pb2_grpc import OrthrusStub
from tests.collector import Collector, running_collector
from tests.conftest import ROOT


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Collects the traces of the running application. Only requests that ask for it are traced."""
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="package")
def serve_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the running application's ingress and replicas write their logs."""
    return tmp_path_factory.mktemp("serve-logs")


@pytest.fixture(scope="package")
def told() -> list[str]:
    """What the start of the running application was waiting for, in order."""
    return []


@pytest.fixture(scope="package")
def ports(
    tmp_path_factory: pytest.TempPathFactory, serve_logs: Path, collector: Collector, told: list[str]
) -> Iterator[tuple[int, int]]:
    """Serve configs/tiny-cpu.yaml. Gives the ports of HTTP and gRPC.

    Drafts are made whatever they cost: tests assert on drafts, and on a busy machine the planner might choose none.
    """
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    web, rpc = free_port(), free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": web}
    config["grpc_options"]["port"] = rpc
    config["controller_options"]["runtime_env"]["env_vars"] |= {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "orthrus.deployments.tracing:otlp",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    args = config["applications"][0]["args"]
    args["engine"]["adaptive_draft"] = False
    # One replica, so that its counters are those of all requests.
    del args["replica"]["autoscaling_config"]
    args["api"] = {"body_timeout_s": 3, "log_prompts": True}
    for part in ("ingress", "replica"):
        args[part]["logging_config"] = {"logs_dir": str(serve_logs), "encoding": "JSON"}
    path = tmp_path_factory.mktemp("serve") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    # No test looks at how an ingress drains, but the end of each application waits for it.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        try:
            serve_config(path, tell=told.append)
            yield web, rpc
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="package")
def url(ports: tuple[int, int]) -> str:
    return f"http://127.0.0.1:{ports[0]}"


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="package")
def stub(ports: tuple[int, int]) -> OrthrusStub:
    return OrthrusStub(grpc.insecure_channel(f"127.0.0.1:{ports[1]}"))
