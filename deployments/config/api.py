"""Settings of the API, which are `args.api` in a config: who may call it, and how much."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


class ResponseStoreConfig(BaseModel):
    """Bounds of the store for the responses of /v1/responses. It is in memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_responses: int = Field(default=10_000, ge=1)
    """Most responses that are kept."""
    max_bytes: int = Field(default=256 << 20, ge=1)
    """Most bytes that they take together."""
    lifetime_s: float = Field(default=24 * 3600.0, gt=0, allow_inf_nan=False)
    """Seconds for which each response is kept."""


class ApiConfig(BaseModel):
    """An application's rules for its callers, HTTP and gRPC alike. An unknown key or a value out of range is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys_file: Path | None = None
    """The file of API keys that may call (`deployments.access.keys`), on every node that runs an ingress. With neither this nor
    `keys_env`, anyone who reaches the port may call."""
    keys_env: str | None = Field(default=None, min_length=1)
    """The environment variable of the ingress that holds the text of such a file."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Limit of a key that has none of its own."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Limit of a key that has none of its own. Prompt tokens and generated tokens count."""
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Largest request body."""
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds that a client has for sending its request."""
    log_prompts: bool = False
    """Whether the log holds prompts."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """What to do with a request that has an unknown field. "ignore" names the field in a header of the answer."""
    cors_origins: list[str] = Field(default_factory=list)
    """Origins of the web pages that browsers let call the API, such as "https://chat.example"; "*" for any."""
    response_store: ResponseStoreConfig | None = None
    """Keep the responses of /v1/responses, so that clients can ask for them again and continue them. {} for the usual bounds."""
    page: bool = True
    """Whether to serve the web page at `/`."""

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
