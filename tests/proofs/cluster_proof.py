"""`ray up` on given hosts, for real: three hosts in network namespaces, deploy, traffic, one host killed, `ray down`.

`make test-cluster` runs it. It takes minutes and needs root. Two things differ from cluster/local.yaml: the hosts use this Python
environment instead of the one that the setup commands would install, and the workers' GPUs are fake.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.cluster.config import ClusterConfig
from tests.network_hosts import NetworkHosts, missing_programs

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.prefix) / "bin" / "ray"
PROMPT = "".join(f"def add_{n}(a, b):\n    return a + b + {n}\n\n\n" for n in range(4))


def serve_config() -> dict[str, Any]:
    """tiny-cpu.yaml as a GPU config: one replica per fake H100, on two hosts; an ingress on each."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    args = config["applications"][0]["args"]
    args["engine"] |= {"device": "auto", "adaptive_draft": False}
    args["replica"]["ray_actor_options"] |= {"num_gpus": 1, "accelerator_type": "H100"}
    args["replica"]["autoscaling_config"]["min_replicas"] = 2
    args["ingress"] |= {"num_replicas": 2, "max_replicas_per_node": 1}
    return config


def cluster_file(hosts: NetworkHosts) -> Path:
    """cluster/local.yaml, changed for these hosts. The files that it mounts are in `NetworkHosts.state`."""
    given: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    head, *workers = hosts.addresses.values()
    given["provider"] |= {"head_ip": head, "worker_ips": workers}
    given["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    (hosts.state / "auth_token").write_text("0" * 64)
    (hosts.state / "serve.yaml").write_text(yaml.safe_dump(serve_config()))
    given["file_mounts"] = {
        "~/orthrus": str(ROOT),
        "~/.ray/auth_token": str(hosts.state / "auth_token"),
        "~/serve.yaml": str(hosts.state / "serve.yaml"),
    }
    install = [command for command in given["setup_commands"] if "uv " in command]
    assert len(install) == 3, "what this environment stands in for"
    given["setup_commands"] = [
        f"ln -sfn {sys.prefix} ~/venv",
        *(command for command in given["setup_commands"] if command not in install),
        "grep -q PYTHONPATH ~/.bashrc || echo 'export PYTHONPATH=$HOME/orthrus OMP_NUM_THREADS=1' >> ~/.bashrc",
    ]
    small = " --object-store-memory=100000000 --disable-usage-stats"
    resources = " --num-cpus=2 --num-gpus=1 --resources='{\"accelerator_type:H100\": 1}'"
    given["head_start_ray_commands"] = [
        re.sub(r"(ray start .*)", rf"\1{small}", c).replace("configs/qwen3-8b-h100.yaml", "~/serve.yaml")
        for c in given["head_start_ray_commands"]
    ]
    given["worker_start_ray_commands"] = [
        re.sub(r"(ray start .*)", lambda m: m[1] + small + resources, c)
        for c in given["worker_start_ray_commands"]
    ]
    path = hosts.state / "cluster.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    ClusterConfig.load(path)
    return path


def ray(*arguments: str, seconds: float = 300) -> str:
    done = subprocess.run([str(RAY), *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    assert done.returncode == 0, f"ray {' '.join(arguments)}: {done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


def complete(address: str, seconds: float = 20) -> str:
    """The text of one answer. Raises OSError if there is none: urllib's errors are of that class."""
    body = {"model": "orthrus-tiny", "prompt": PROMPT, "max_tokens": 48, "temperature": 0}
    request = urllib.request.Request(
        f"http://{address}:8000/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def answers_in_a_row(address: str, count: int, seconds: float) -> set[str]:
    """Send requests until `count` in a row succeed, and return their texts. A request that hangs counts as failed."""
    deadline, texts = time.monotonic() + seconds, list[str]()
    while len(texts) < count:
        assert time.monotonic() < deadline, f"{len(texts)} answers in a row from {address} when time was over"
        try:
            texts.append(complete(address))
        except OSError:
            texts.clear()
            time.sleep(1)
    return set(texts)


@pytest.fixture
def hosts() -> Iterator[NetworkHosts]:
    missing = missing_programs()
    if missing:
        pytest.fail(f"this needs {', '.join(missing)}: as root, apt-get install what is a package")
    with NetworkHosts(["head", "worker1", "worker2"], visible=ROOT) as started:
        yield started


def test_ray_up_serve_lose_a_host_ray_down(hosts: NetworkHosts) -> None:
    file = str(cluster_file(hosts))
    head = hosts.addresses["head"]
    os.environ.pop("RAY_ADDRESS", None)
    ray("up", "--yes", "--no-config-cache", file)
    try:
        [text] = answers_in_a_row(head, 1, 240)

        def placed() -> Counter[str]:
            """Running replicas by deployment, as Serve's own status tells."""
            said = ray("exec", file, "serve status 2> /dev/null").partition("applications:")
            status = yaml.safe_load("".join(said[1:]).replace("\x1b[0m", ""))
            deployments = status["applications"]["orthrus"]["deployments"]
            return Counter({name: d["replica_states"].get("RUNNING", 0) for name, d in deployments.items()})

        deadline = time.monotonic() + 180
        while placed() != Counter(OrthrusReplica=2, Ingress=2):
            assert time.monotonic() < deadline, placed()
            time.sleep(2)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(complete, [head] * 24)) == {text}, "every host gives the same answer"

        hosts.kill("worker2")
        # Until the loss is noticed, what was meant for that host fails or waits; then all of it goes to the other one.
        assert answers_in_a_row(head, 12, 120) == {text}
    finally:
        print(ray("down", "--yes", file, seconds=120))
    # `ray down` stops the head. A worker ends itself when it has not reached the head for a minute, except for Ray's log
    # monitor and HAProxy, which stay until the next `ray up` stops them.
    deadline = time.monotonic() + 150
    stay = {"head": ("log_monitor",), "worker1": ("log_monitor", "haproxy-serve")}
    while left := [
        p for name in stay for p in hosts.processes(name) if not any(part in p for part in stay[name])
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
