"""Reads a Serve config, the file that `serve deploy` takes. Every fault is reported with its place before anything starts."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError
from ray.serve.schema import (
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
    gRPCOptionsSchema,
)

from orthrus.deployments.config.app_args import AppArgs, parse_args
from orthrus.deployments.config.faults import describe_faults
from orthrus.errors import ConfigError
from orthrus.yaml_file import Keys, YamlFile, read_yaml, spell_path

OUR_APPLICATION = "orthrus.deployments.app:build"
HTTP_PORT: Keys = ("http_options", "port")
GRPC_PORT: Keys = ("grpc_options", "port")


class _HTTPOptions(HTTPOptionsSchema):
    model_config = ConfigDict(extra="forbid")

    port: int = Field(default=8000, ge=1, le=65535)


class _GRPCOptions(gRPCOptionsSchema):
    model_config = ConfigDict(extra="forbid")

    port: int = Field(default=9000, ge=1, le=65535)


class _Application(ServeApplicationSchema):
    model_config = ConfigDict(extra="forbid")


class _Config(ServeDeploySchema):
    """Serve's schema, which itself ignores unknown keys. Here they are errors."""

    model_config = ConfigDict(extra="forbid")

    http_options: _HTTPOptions = Field(default_factory=_HTTPOptions)
    grpc_options: _GRPCOptions = Field(default_factory=_GRPCOptions)
    applications: list[_Application]


def load_config(path: Path) -> tuple[ServeDeploySchema, dict[str, AppArgs]]:
    """A Serve config file, and the args of our applications in it by application name. All is checked except the models.

    Raises ConfigError with a line for each fault: file, line, column, the path of keys and what to change.
    """
    file = read_yaml(path)
    if not isinstance(file.data, dict):
        found = (
            "is empty" if file.data is None else f"holds a {type(file.data).__name__}, not keys with values"
        )
        raise ConfigError(f"{file.place(())}: {path.name} {found}: configs/ has examples of a Serve config")
    try:
        _Config.model_validate(file.data)
        config = ServeDeploySchema.model_validate(file.data)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, _Config, file=file)) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a Serve config: {error}") from error
    args: dict[str, AppArgs] = {}
    faults = list(_port_faults(config, file))
    for index, app in enumerate(config.applications):
        if app.import_path != OUR_APPLICATION:
            continue
        where: Keys = ("applications", index)
        if app.deployments:
            said = "options go under args.replica and args.ingress: move them there"
            faults.append(_located(file, (*where, "deployments"), said))
        try:
            args[app.name] = parse_args(app.args, (*where, "args"), file)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return config, args


def serves_grpc(config: ServeDeploySchema) -> bool:
    """Whether Serve opens the gRPC port, which it does only if the config names servicer functions."""
    return bool(config.grpc_options.grpc_servicer_functions)


def _port_faults(config: ServeDeploySchema, file: YamlFile) -> Iterator[str]:
    port = config.http_options.port
    if serves_grpc(config) and port == config.grpc_options.port:
        at = spell_path(HTTP_PORT)
        yield _located(file, GRPC_PORT, f"{port} is {at} too: give HTTP and gRPC a port each")


def _located(file: YamlFile, path: Keys, said: str) -> str:
    return f"{file.place(path)}: {spell_path(path)}: {said}"
