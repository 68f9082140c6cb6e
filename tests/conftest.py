"""Fixtures that several test modules share: tiny checkpoints, built once per run, read only."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports huggingface_hub, which reads them once: tests never wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import yaml

# Without a GPU, Triton's kernels run in its interpreter; it too is asked for once, where a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.checkpoints import make_checkpoint
from tests.reference import Reference

if TYPE_CHECKING:
    import openai

    from deployments.proto.orthrus_pb2_grpc import OrthrusStub
    from orthrus.engine import Engine
    from tests.collector import Collector

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_orthrus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Orthrus checkpoint whose drafts are right now and then (float32, tied, block of 8)."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-orthrus")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3 checkpoint: the AR view of `tiny_orthrus`."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-qwen3", diffusion=False)


@pytest.fixture(scope="session")
def tiny_reference(tiny_orthrus: Path) -> Reference:
    """The Hugging Face reference of `tiny_orthrus`."""
    return Reference(tiny_orthrus)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per byte: ids 0 to 255 in the order of byte-level BPE's alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are too small to share out: threads would mostly wait for each other."""
    torch.set_num_threads(1)


# --- one running Serve application for all test modules that talk to one: its start is dear


@pytest.fixture(scope="session")
def collector() -> Iterator["Collector"]:
    """Where the traces of the running application go, of those requests that ask to be traced."""
    from tests.collector import running_collector

    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def serve_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the running application's ingress and replicas write their logs."""
    return tmp_path_factory.mktemp("serve-logs")


@pytest.fixture(scope="session")
def told() -> list[str]:
    """What the start of the running application was waiting for, in order."""
    return []


@pytest.fixture(scope="session")
def ports(
    tmp_path_factory: pytest.TempPathFactory, serve_logs: Path, collector: "Collector", told: list[str]
) -> Iterator[tuple[int, int]]:
    """configs/tiny-cpu.yaml on free ports; HTTP's and gRPC's.

    It drafts whatever a pass costs: on a busy machine the cost model would rather not, and the tests assert on drafting.
    """
    import ray
    from ray import serve

    from deployments.launch.environment import free_port
    from deployments.launch.serve import serve_config

    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    web, rpc = free_port(), free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": web}
    config["grpc_options"]["port"] = rpc
    config["controller_options"]["runtime_env"]["env_vars"] |= {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.tracing:otlp",
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
    try:
        serve_config(path, tell=told.append)
        yield web, rpc
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="session")
def url(ports: tuple[int, int]) -> str:
    return f"http://127.0.0.1:{ports[0]}"


@pytest.fixture(scope="session")
def client(url: str) -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def stub(ports: tuple[int, int]) -> "OrthrusStub":
    import grpc

    from deployments.proto.orthrus_pb2_grpc import OrthrusStub

    return OrthrusStub(grpc.insecure_channel(f"127.0.0.1:{ports[1]}"))


@pytest.fixture(scope="session")
def ar() -> "Engine":
    """Plain AR decoding of the served model: what every answer must be."""
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig

    model = str(ROOT / "models" / "orthrus-tiny")
    return Engine.from_pretrained(
        EngineConfig(model=model, schedule="ar", device="cpu", kv_cache_tokens=8192)
    )


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    """Qwen3's own tokenizer. What can't be fetched fails the test: a skip would hide that nothing was checked."""
    from orthrus.text.tokenizer import load_tokenizer
    from tests.qwen3_tokenizer import fetch

    try:
        path = fetch()
    except (OSError, ValueError) as error:
        pytest.fail(f"Qwen3's tokenizer could not be downloaded, and this test needs it: {error}")
    return load_tokenizer(path)
