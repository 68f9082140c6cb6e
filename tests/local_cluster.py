"""A Ray Serve instance of its own for the tests that break things: what runs where, and clients that only read."""

import asyncio
import json
import os
import signal
import time
import urllib.parse
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
from ray.serve.schema import ApplicationStatus, ReplicaState

from orthrus.deployments.app import make_application
from orthrus.deployments.launch.environment import free_port, set_environment
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
MODEL = "orthrus-tiny"
DEPLOY_SECONDS = 120
STREAM_SECONDS = 180
"""How long an answer may take, its wait for a replica included: more than any test lets one wait."""
_MARK = "ORTHRUS_TEST_CLUSTER"


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
        """What it tells request routers (deployments/replica/reports.py). Of OrthrusReplica only."""
        actor = ray.get_actor(self.actor, namespace=SERVE_NAMESPACE)
        report: dict[str, Any] = ray.get(actor.record_routing_stats.remote(), timeout=30)
        return report

    @property
    def free(self) -> bool:
        """Whether no request holds rows or pages of it."""
        report = self.report()
        return not report["sequences"] and not report["pages"]


@dataclass(frozen=True)
class App:
    """An application on the Serve instance that this process has started, over HTTP at `url`."""

    name: str
    url: str

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    @property
    def route(self) -> str:
        return urllib.parse.urlsplit(self.url).path or "/"

    def deploy(
        self, load: Callable[[EngineConfig], Engine] = Engine.from_pretrained, /, **changes: dict[str, Any]
    ) -> None:
        """configs/tiny-cpu.yaml with changes of `engine`, `replica` and `ingress`; None removes a key. Waits until it runs.

        load: makes the replicas' engines. The config drafts whatever a pass costs, and little, so that many sequences are not
        too much for this machine.
        """
        args = tiny_args()
        args["engine"] |= {"adaptive_draft": False, "draft_length": 4}
        for part, change in changes.items():
            args[part] = {k: v for k, v in {**args.get(part, {}), **change}.items() if v is not None}
        target = serve.RunTarget(make_application(args, load), name=self.name, route_prefix=self.route)
        # Without Serve's own waiting, which has no end.
        serve.run_many(
            [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        wait_for(self._runs, DEPLOY_SECONDS, f"the application {self.name} runs")

    def _runs(self) -> bool:
        status = serve.status().applications[self.name]
        assert status.status != ApplicationStatus.DEPLOY_FAILED, status.message
        return status.status == ApplicationStatus.RUNNING

    def running(self, deployment: str = "OrthrusReplica") -> list[Replica]:
        apps = _get_global_client().get_serve_details()["applications"]
        replicas = apps[self.name]["deployments"][deployment]["replicas"] if self.name in apps else []
        return [Replica(r["pid"], r["actor_name"]) for r in replicas if r["state"] == ReplicaState.RUNNING]

    def samples(self, metric: str) -> dict[tuple[str, ...], float]:
        """The application's samples of a metric that replicas export, by the replica; or else by all its labels' values."""
        [node] = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            # Only its own lines, because parsing all of them takes long.
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(metric)]
        return {
            tuple(
                v
                for k, v in sorted(s.labels.items())
                if k in ("deployment", "replica", "direction", "rule", "by")
            ): s.value
            for family in text_string_to_metric_families("\n".join([*lines, ""]))
            for s in family.samples
            if s.name == metric and s.labels.get("application") == self.name
        }


def tiny_args() -> dict[str, Any]:
    """The args of configs/tiny-cpu.yaml's application."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    args: dict[str, Any] = config["applications"][0]["args"]
    return args


def serve_log(component: str) -> str:
    """All that Serve's `component` (controller, replica, ...) has logged."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    return "".join(path.read_text() for path in sorted(folder.glob(f"{component}*.log")))


def processes() -> dict[int, tuple[str, str]]:
    """State (as in ps) and command of each process that belongs to the cluster started here, by pid."""
    session = ray._private.worker._global_node.get_session_dir_path().encode()
    mark = f"{_MARK}={os.getpid()}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            command = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if mark in (entry / "environ").read_bytes() or session in command:
                found[int(entry.name)] = state, command.replace(b"\0", b" ").decode().strip()
        except OSError:
            continue  # It has ended meanwhile.
    return found


def pids(command: str) -> list[int]:
    """Processes of this cluster whose command has `command` in it."""
    return [pid for pid, (_, its) in processes().items() if command in its]


@contextmanager
def local_cluster(name: str = "orthrus") -> Iterator[App]:
    """Serve on this machine, with more CPUs than there are, since replicas are small here; and where the application goes."""
    http, grpc = free_port(), free_port()
    set_environment()
    os.environ |= {_MARK: str(os.getpid()), "RAY_metrics_report_interval_ms": "1000"}
    ray.init(
        address="local",
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": http},
            grpc_options={
                "port": grpc,
                "grpc_servicer_functions": ["orthrus.deployments.grpc_service.add_to_server"],
            },
        )
        yield App(name, f"http://127.0.0.1:{http}")
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Poll until `condition` gives something, and return it. what: what is waited for, said when it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition}: not so after {seconds} s"
        time.sleep(0.1)
    return found


async def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """`wait_for` while streams go on. Conditions must not block."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {seconds} s"
        await asyncio.sleep(0.05)


# --- clients


@dataclass
class Stream:
    """One answer as a client sees it: `text` so far; `error` if it ended with one; `finished` with its last event."""

    prompt: str
    max_tokens: int
    session: str = ""
    text: str = ""
    events: int = 0
    error: str = ""
    finished: bool = False
    cached_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def ended(self) -> bool:
        return self.finished or bool(self.error)

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
            headers = {"x-session-id": self.session} if self.session else {}
            async with session.post(url, json=body, headers=headers) as answer:
                if answer.status != 200:
                    self.error = f"{answer.status}: {await answer.text()}"
                    return self
                async for line in answer.content:
                    self._take(line.decode().strip().removeprefix("data: "))
        except TimeoutError:
            self.error = f"no end after {STREAM_SECONDS} s, and {self.events} events"
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


async def under_way(streams: list[Stream], count: int) -> None:
    """Wait until `count` of the answers have begun and not ended. More than one replica has slots: each has begun some then."""

    def enough() -> bool:
        return sum(stream.events > 3 and not stream.ended for stream in streams) >= count

    await until(enough, STREAM_SECONDS, f"{count} of {len(streams)} answers are under way")


async def kill_under(app: App, streams: list[Stream], count: int) -> None:
    """Kill a replica while `count` of `streams` are under way, and wait for all of them."""
    victim = app.running()[0]
    asked = asyncio.create_task(answers(app.completions, streams))
    await under_way(streams, count)
    os.kill(victim.pid, signal.SIGKILL)
    await asked


def check_failures(streams: list[Stream], text: str) -> list[Stream]:
    """After a replica's death: those that it had begun say what happened, and are returned; all others have their text."""
    failed = [stream for stream in streams if stream.error]
    for stream in failed:
        assert "replica that was answering has stopped" in stream.error, stream
        assert stream.text and text.startswith(stream.text), "what it had sent is right"
    assert {stream.text for stream in streams if not stream.error} == {text}
    return failed


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
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=STREAM_SECONDS),
    )
