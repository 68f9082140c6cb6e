"""Tries the ports of a Serve config on this machine. Serve itself would fail only after a minute, and not name the port."""

import errno
import socket

from ray.serve.schema import ServeDeploySchema

from orthrus.deployments.config.config_file import GRPC_PORT, HTTP_PORT, serves_grpc
from orthrus.errors import ConfigError
from orthrus.yaml_file import Keys, spell_path

_HTTP_HOST: Keys = ("http_options", "host")
_ALL_ADDRESSES = ("0.0.0.0", "::")


def check_ports(config: ServeDeploySchema) -> None:
    """Raise ConfigError, naming port and setting, unless Serve could listen for HTTP and gRPC here and now."""
    host = config.http_options.host or _ALL_ADDRESSES[0]
    wanted = [(HTTP_PORT, config.http_options.port)]
    if serves_grpc(config):
        wanted.append((GRPC_PORT, config.grpc_options.port))  # On HTTP's host.
    for setting, port in wanted:
        _check_port(host, port, spell_path(setting))


def _check_port(host: str, port: int, setting: str) -> None:
    at = spell_path(_HTTP_HOST)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{at} {host!r} is no address ({said}): set it to 0.0.0.0 or one of this machine's"
        ) from error
    failed: list[OSError] = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as listener:
                # As servers do: a port is free if its connections have just ended, and taken if others share it (SO_REUSEPORT).
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
        except OSError as error:
            failed.append(error)
    in_the_way = [error for error in failed if error.errno in (errno.EADDRINUSE, errno.EACCES)]
    # A host name may have several addresses, of which this machine has only some.
    if in_the_way or len(failed) == len(found):
        cause = (in_the_way or failed)[0]
        raise ConfigError(_advice(cause, host, port, setting)) from cause


def _advice(error: OSError, host: str, port: int, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use on this machine: end what listens there (another `orthrus serve`?), or set "
            f"{setting} to another port"
        )
    if error.errno == errno.EACCES:
        return f"port {port} is only for privileged users: set {setting} to a port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{spell_path(_HTTP_HOST)} {host!r} is no address of this machine: set it to 0.0.0.0, for all of them, or to "
            "one of them"
        )
    return f"{setting}: can't listen on {host}:{port}: {error.strerror}"
