"""Starting and ending a server: ports in use, messages of progress, and no processes left behind."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.deployments.config.config_file import load_config
from orthrus.deployments.launch.environment import free_port
from orthrus.deployments.launch.ports import check_ports
from orthrus.deployments.launch.progress import Progress
from orthrus.errors import ConfigError
from tests.conftest import ROOT

TINY = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())


def written(path: Path, **options: dict[str, Any]) -> Path:
    config = {**TINY, **{key: {**TINY[key], **value} for key, value in options.items()}}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("setting", ["http_options", "grpc_options"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_taken_port_is_named_with_its_setting(tmp_path: Path, setting: str, shared: bool) -> None:
    """Even if its owner lets others listen on it too, as gRPC servers do."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {name: {"port": free_port()} for name in ("http_options", "grpc_options")}
        port = ports[setting]["port"] = taken.getsockname()[1]
        config, _ = load_config(written(tmp_path / "serve.yaml", **ports))
        with pytest.raises(
            ConfigError, match=f"port {port} is in use on this machine.* set {setting}.port to"
        ):
            check_ports(config)
    check_ports(config)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.77", "http_options.host '192.0.2.77' is no address of this machine: set it to 0.0.0.0"),
        ("nowhere.invalid", r"http_options.host 'nowhere.invalid' is no address \("),
        ("a" * 70, "http_options.host 'aaa"),
    ],
)
def test_a_host_that_is_not_here_is_named(tmp_path: Path, host: str, said: str) -> None:
    ports: dict[str, dict[str, Any]] = {
        "http_options": {"host": host, "port": free_port()},
        "grpc_options": {"port": free_port()},
    }
    config, _ = load_config(written(tmp_path / "serve.yaml", **ports))
    with pytest.raises(ConfigError, match=said):
        check_ports(config)


def test_the_grpc_port_is_only_tried_where_it_is_opened(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = {
            "http_options": {"port": free_port()},
            "grpc_options": {"port": taken.getsockname()[1], "grpc_servicer_functions": []},
        }
        config, _ = load_config(written(tmp_path / "serve.yaml", **options))
        check_ports(config)


def test_a_second_server_ends_before_ray_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = written(
            tmp_path / "serve.yaml", http_options={"port": port}, grpc_options={"port": free_port()}
        )
        program = (
            "import sys, orthrus.deployments.launch.serve as s\ntry: s.serve_config(s.Path(sys.argv[1]))\n"
            "except ValueError as error: print(error, 'torch' in sys.modules, s.ray.is_initialized())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)], cwd=ROOT, capture_output=True, text=True, check=True
        )
    assert f"port {port} is in use" in done.stdout and done.stdout.endswith("False False\n")


def test_progress_is_printed_when_it_changes_and_in_between() -> None:
    out = io.StringIO()
    with Progress(out, period=0.05) as progress:
        progress.now("loading")
        progress.now("loading")
        deadline = time.monotonic() + 30
        while out.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.now("waiting")
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading" and lines[-1] == "waiting"
    assert lines[1:-1] and set(lines[1:-1]) == {"loading (0 s)"}


SUPERVISED = r"""
import os, subprocess, sys, time
from orthrus.deployments.launch.supervisor import run_supervised
def work():
    # One in a session of its own whose parent has gone, and one that will not be asked.
    lone = "import os,time; os.setsid(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"
    subprocess.run(["sh", "-c", f'{sys.executable} -c "$1" & ', "sh", lone])
    deaf = "import signal,time,os; signal.signal(15, signal.SIG_IGN); os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", deaf])
    if sys.argv[1] == "fails":
        time.sleep(2)
        return 7
    time.sleep(60)
sys.exit(run_supervised(work))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("end", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (None, 7)]
)
def test_no_process_is_left_behind(end: signal.Signals | None, status: int) -> None:
    command = [sys.executable, "-c", SUPERVISED, "fails" if end is None else "stays"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None and started.stderr is not None
        pids = [int(started.stdout.readline()) for _ in range(2)]
        assert all(alive(pid) for pid in pids)
        if end is not None:
            started.send_signal(end)
        assert started.wait(60) == status
        assert not any(alive(pid) for pid in pids)
        assert started.stderr.read() == ("" if end is None else "\nStopping.\n")


def test_work_that_is_killed_is_an_error() -> None:
    program = "import os, sys\nfrom orthrus.deployments.launch.supervisor import run_supervised\n"
    program += "sys.exit(run_supervised(lambda: os.kill(os.getpid(), 9)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "orthrus: ended by SIGKILL\n")
