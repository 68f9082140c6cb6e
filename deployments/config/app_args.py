"""The typed `args` of a Serve config. For a setting that can't work, the error says where it is and what to change."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ray._common.utils import import_attr
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.config.faults import describe_faults
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.yaml_file import Keys, YamlFile

OUR_ROUTER = "orthrus.deployments.router.PrefixRouter"
"""The replicas' request router where the config names none."""


class _Policy(AutoscalingPolicy):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _works(cls, values: Any) -> Any:
        """Make the policy here, since Serve's controller would only log why it can't."""
        if isinstance(values, Mapping) and "policy_function" in values:
            policy = _import(values["policy_function"])
            if isinstance(policy, type):
                try:
                    policy(**values.get("policy_kwargs") or {})
                except TypeError as error:
                    said = str(error).rpartition("__init__() ")[2]
                    raise ValueError(f"policy_kwargs: {said}") from error
        return values


class _Autoscaling(AutoscalingConfig):
    model_config = ConfigDict(extra="forbid")

    policy: _Policy = Field(default_factory=_Policy)


class _Router(RequestRouterConfig):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _exists(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("request_router_class"), str):
            _import(values["request_router_class"])
        return values


class _ReplicaRouter(_Router):
    request_router_class: str | Callable[..., Any] = OUR_ROUTER

    @model_validator(mode="after")
    def _takes_its_settings(self) -> "_ReplicaRouter":
        """Check the settings of our router here: if it can't be made, every request waits for ever."""
        if self.request_router_class == OUR_ROUTER and self.request_router_kwargs:
            try:
                _import(OUR_ROUTER).check_settings(**self.request_router_kwargs)
            except TypeError as error:
                raise ValueError(f"request_router_kwargs: {str(error).rpartition('() ')[2]}") from error
        return self


class _ActorOptions(RayActorOptionsSchema):
    model_config = ConfigDict(extra="forbid")


class DeploymentOptions(DeploymentSchema):
    """Serve's own options of a deployment (num_replicas, ray_actor_options, ...), unknown keys refused at every level."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="", exclude=True)
    autoscaling_config: _Autoscaling | None = None
    ray_actor_options: _ActorOptions = Field(default_factory=_ActorOptions)
    request_router_config: _Router = Field(default_factory=_Router)

    @field_validator("name")
    @classmethod
    def _named_by_us(cls, name: str) -> str:
        raise ValueError("the application names its deployments itself: remove it")


class ReplicaOptions(DeploymentOptions):
    """The same of the replicas' deployment."""

    request_router_config: _ReplicaRouter = Field(default_factory=_ReplicaRouter)


class AppArgs(BaseModel):
    """An application: one model, its replicas and the ingress in front of them. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")

    engine: EngineConfig
    replica: ReplicaOptions = Field(default_factory=ReplicaOptions)
    ingress: DeploymentOptions = Field(default_factory=DeploymentOptions)
    api: ApiConfig = Field(default_factory=ApiConfig)

    @model_validator(mode="after")
    def _gpus_fit_the_device(self) -> "AppArgs":
        gpus = self.replica.ray_actor_options.num_gpus or 0
        device, wanted = self.engine.device.split(":")[0], self.engine.tensor_parallel_size
        at = "replica.ray_actor_options.num_gpus"
        if gpus != wanted and (device == "cuda" or (device == "auto" and gpus and wanted > 1)):
            raise ValueError(
                f"{at} is {gpus:g}, and a replica on device {device} needs {wanted} of its own: set it to {wanted}"
            )
        if device == "cpu" and gpus:
            raise ValueError(
                f"{at} is {gpus:g}, and engine.device is cpu: remove it, or set engine.device to cuda"
            )
        return self

    @model_validator(mode="after")
    def _requests_fill_the_batch(self) -> "AppArgs":
        limit, batch = self.replica.max_ongoing_requests, self.engine.max_num_seqs
        if "max_ongoing_requests" in self.replica.model_fields_set and limit < batch:
            raise ValueError(
                f"replica.max_ongoing_requests {limit} keeps the engine from ever running its engine.max_num_seqs "
                f"{batch}: raise the one or lower the other"
            )
        return self


def parse_args(args: Mapping[str, Any], where: Keys = ("args",), file: YamlFile | None = None) -> AppArgs:
    """The checked args. Raises ConfigError with a line for each fault: its path, beginning with `where`, and the fix.

    file: the file that the args come from; each line then begins with file, line and column.
    """
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, AppArgs, where, file)) from error


def _import(path: str) -> Any:
    try:
        return import_attr(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} can't be imported: {error}") from error
