"""The ports of a Ray cluster that this machine shares with others."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments import environment
from tests.conftest import ROOT


def test_a_block_of_ports_has_no_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also none that is taken in a way that lets others share it, as gRPC's servers do."""
    first = environment.free_block()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("", first + 7))
        taken.listen()
        offers = iter([first, first + 50, first])
        monkeypatch.setattr("deployments.environment.random.randrange", lambda *_: next(offers))
        assert environment.free_block() == first + 50
    assert environment.free_block() == first


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that process is killed and can't see to it."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        f"defaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n"
        f"frontend f\n  bind 127.0.0.1:{environment.free_port()}\n"
    )
    starter = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, "-c", "from deployments.haproxy import main; main()", "-db", "-f", str(config)]
    with subprocess.Popen(
        [sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        while not state(pid).startswith("(haproxy)"):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    deadline = time.monotonic() + 10
    while state(pid) not in ("", "(haproxy) Z"):  # Nobody may be there to bury it.
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def state(pid: int) -> str:
    """A process's name and state, as in `(sleep) S`; empty when it is gone."""
    try:
        return " ".join(Path(f"/proc/{pid}/stat").read_text().split()[1:3])
    except (FileNotFoundError, ProcessLookupError):
        return ""
