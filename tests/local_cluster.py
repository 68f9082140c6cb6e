"""A Ray Serve instance of its own for the tests that break things: what runs where, and clients that only read."""

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState

from deployments.app import build
from deployments.environment import free_port, set_environment

ROOT = Path(__file__).resolve().parent.parent
MODEL = "orthrus-tiny"
APP = "orthrus"


@dataclass(frozen=True)
class Replica:
    """One running replica of a deployment, and the name of its actor."""

    pid: int
    actor: str

    @property
    def name(self) -> str:
        """As in the metrics' label `replica`."""
        return self.actor.rpartition("#")[2]

    def report(self) -> dict[str, Any]:
        """What it tells request routers: `rows` and `pages` in use, and names of cached prefixes. Of OrthrusReplica only."""
        actor = ray.get_actor(self.actor, namespace=SERVE_NAMESPACE)
        report: dict[str, Any] = ray.get(actor.record_routing_stats.remote(), timeout=30)
        return report

    @property
    def free(self) -> bool:
        """Whether no request holds rows or pages of it."""
        report = self.report()
        return not report["rows"] and not report["pages"]


class LocalCluster:
    """Serve on this machine, with as many CPUs as tests like: replicas are small here."""

    def __init__(self) -> None:
        self.http, self.grpc = free_port(), free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}/v1/completions"

    def deploy(self, **changes: dict[str, Any]) -> None:
        """configs/tiny-cpu.yaml with changes of `engine`, `replica` and `ingress`; waits until it runs."""
        serve.run(build(self.args(**changes)), name=APP, route_prefix="/")

    @staticmethod
    def args(**changes: dict[str, Any]) -> dict[str, Any]:
        """The application's args; a value of None removes its key."""
        config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
        args: dict[str, Any] = config["applications"][0]["args"]
        args["engine"] |= {"adaptive_draft": False, "draft_length": 4}
        for part, change in changes.items():
            args[part] = {k: v for k, v in {**args[part], **change}.items() if v is not None}
        return args

    def running(self, deployment: str = "OrthrusReplica") -> list[Replica]:
        apps = _get_global_client().get_serve_details()["applications"]
        replicas = apps[APP]["deployments"][deployment]["replicas"] if APP in apps else []
        return [Replica(r["pid"], r["actor_name"]) for r in replicas if r["state"] == ReplicaState.RUNNING]

    def samples(self, metric: str) -> dict[tuple[str, ...], float]:
        """The application's samples of a metric that replicas export, by the replica; or else by all its labels' values."""
        [node] = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            tuple(
                v
                for k, v in sorted(s.labels.items())
                if k in ("deployment", "replica", "direction", "rule", "by")
            ): s.value
            for family in families
            for s in family.samples
            if s.name == metric and s.labels.get("application") == APP
        }

    def log(self, component: str) -> str:
        """All that Serve's `component` (controller, replica, ...) has logged."""
        folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
        return "".join(path.read_text() for path in sorted(folder.glob(f"{component}*.log")))

    def pids(self, command: str) -> list[int]:
        """Processes of this cluster whose command has `command` in it."""
        return [pid for pid, (_, c) in self.processes().items() if command in c]

    def processes(self) -> dict[int, tuple[str, str]]:
        """State (as in ps) and command of each process that belongs to this cluster, by pid."""
        session = ray._private.worker._global_node.get_session_dir_path().encode()
        mark = f"ORTHRUS_TEST_CLUSTER={self.http}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if mark in (entry / "environ").read_bytes() or session in command:
                    found[int(entry.name)] = state, command.replace(b"\0", b" ").decode().strip()
            except (OSError, ValueError):
                continue
        return found


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    cluster = LocalCluster()
    set_environment()
    os.environ |= {"ORTHRUS_TEST_CLUSTER": str(cluster.http), "RAY_metrics_report_interval_ms": "1000"}
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": cluster.http},
            grpc_options={
                "port": cluster.grpc,
                "grpc_servicer_functions": ["deployments.grpc_service.add_to_server"],
            },
        )
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Poll until `condition` gives something, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition} after {seconds} s"
        time.sleep(0.1)
    return found


# --- clients


@dataclass
class Stream:
    """One answer as a client sees it: `text` so far; `error` if it ended with one; `finished` with its last event."""

    prompt: str
    max_tokens: int
    text: str = ""
    events: int = 0
    error: str = ""
    finished: bool = False
    cached_tokens: int = 0
    prompt_tokens: int = 0

    async def run(self, session: aiohttp.ClientSession, url: str) -> "Stream":
        """Ask, and read to the end. Errors of any kind are noted."""
        body = {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with session.post(url, json=body) as answer:
                if answer.status != 200:
                    self.error = f"{answer.status}: {await answer.text()}"
                    return self
                async for line in answer.content:
                    self._take(line.decode().strip().removeprefix("data: "))
        except (aiohttp.ClientError, OSError) as error:
            self.error = f"{type(error).__name__}: {error}"
        if not self.finished and not self.error:
            self.error = "the answer just ended"
        return self

    def _take(self, event: str) -> None:
        if not event:
            return
        self.events += 1
        if event == "[DONE]":
            self.finished = not self.error
            return
        said = json.loads(event)
        if "error" in said:
            self.error = said["error"]["message"]
        for choice in said.get("choices", ()):
            self.text += choice["text"]
        if said.get("usage"):
            self.prompt_tokens = said["usage"]["prompt_tokens"]
            self.cached_tokens = said["usage"]["prompt_tokens_details"]["cached_tokens"]


async def answers(url: str, streams: list[Stream]) -> list[Stream]:
    """All streams at once, each over a connection of its own, to their ends."""
    async with client_session() as session:
        return list(await asyncio.gather(*(stream.run(session, url) for stream in streams)))


class Clients:
    """Clients that ask again and again until they are stopped."""

    def __init__(self, url: str, prompt: str, max_tokens: int) -> None:
        self.done: list[Stream] = []
        self._url, self._asked = url, (prompt, max_tokens)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.done if stream.error]

    def start(self, count: int) -> None:
        self._tasks += [asyncio.create_task(self._run()) for _ in range(count)]

    async def stop(self) -> None:
        """Let all of them finish what they have asked for."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self) -> None:
        async with client_session() as session:
            while not self._stopping:
                self.done.append(await Stream(*self._asked).run(session, self._url))


def client_session() -> aiohttp.ClientSession:
    """Connections without limits of their own: a connection for each stream, as different clients have."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    )
