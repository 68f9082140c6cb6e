"""Settings of the API: who may call it and how much, what `deployments/` YAML calls `api:`."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


class ResponseStoreConfig(BaseModel):
    """How many responses are kept at most, how many bytes they take in all, and for how many seconds each is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_responses: int = Field(default=10_000, ge=1)
    max_bytes: int = Field(default=256 << 20, ge=1)
    lifetime_s: float = Field(default=24 * 3600.0, gt=0, allow_inf_nan=False)


class ApiConfig(BaseModel):
    """An application's rules for its callers, HTTP and gRPC alike. An unknown key or a value out of range is an error.

    keys_file, keys_env: where the API keys are that may call (`deployments.access.keys`): a file on every node that runs an
    ingress, or an environment variable of the ingress with the file's text. Neither: anyone who reaches the port may.
    requests_per_minute, tokens_per_minute: limits of a key that has none of its own; prompt and generated tokens count.
    max_body_bytes: size of a request; body_timeout_s: time that a client has for sending it. log_prompts: write
    prompts into the log, which is without them by default. unknown_fields: what is done with a request whose body has a
    field that is not known here: it is refused, or the field is ignored and named in a header of the answer. cors_origins:
    web pages that browsers let call the API, by origin ("https://chat.example"; "*" for any): none by default.
    response_store: keep the responses of /v1/responses, so that they can be asked for again and gone on from; within these
    bounds ({} for the usual ones), in memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys_file: Path | None = None
    keys_env: str | None = Field(default=None, min_length=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    log_prompts: bool = False
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    cors_origins: list[str] = Field(default_factory=list)
    response_store: ResponseStoreConfig | None = None

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write it as https://host or http://host:port, or * for any"
                )
        return origins

    @property
    def has_keys(self) -> bool:
        return self.keys_file is not None or self.keys_env is not None

    @model_validator(mode="after")
    def _limits_need_keys(self) -> "ApiConfig":
        if self.keys_file is not None and self.keys_env is not None:
            raise ValueError("keys_file and keys_env are two places for the same keys: remove one")
        limited = self.requests_per_minute is not None or self.tokens_per_minute is not None
        if limited and not self.has_keys:
            raise ValueError(
                "requests_per_minute and tokens_per_minute are limits of a key, and there are no keys: set keys_file"
            )
        return self
