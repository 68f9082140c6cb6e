"""API keys: random, known to the server by their hash alone, each with its expiry and limits.

The keys file is a YAML list of entries as `orthrus keys new` prints them:

    - name: search-team                 # in logs, and whose limits are counted together
      sha256: 5e88...                   # of the key
      expires: 2027-06-30T00:00:00Z     # optional; refused from then on
      requests_per_minute: 600          # optional; else those of the config's `api`
      tokens_per_minute: 200000

A key has 256 random bits, so its SHA-256 can't be reversed and needs no salt. That of a password which a person chose could be.
A change of the file takes effect within seconds, without a restart.
"""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.config.faults import describe_faults
from orthrus.errors import ConfigError
from orthrus.yaml_file import parse_yaml

logger = logging.getLogger("ray.serve")

PREFIX = "sk-orthrus-"
_CHECK_SECONDS = 2.0


class ApiKey(BaseModel):
    """One entry of the keys file. An unset limit is that of the config's `api`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: datetime | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)

    @field_validator("expires")
    @classmethod
    def _in_utc(cls, expires: datetime | None) -> datetime | None:
        """A time without a zone is UTC."""
        return expires if expires is None or expires.tzinfo is not None else expires.replace(tzinfo=UTC)

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires


class _Keys(BaseModel):
    keys: list[ApiKey]

    @model_validator(mode="after")
    def _are_different(self) -> "_Keys":
        for what in ("name", "sha256"):
            given = [getattr(key, what) for key in self.keys]
            if twice := {value for value in given if given.count(value) > 1}:
                raise ValueError(f"keys: two entries have the {what} {min(twice)}: give each its own")
        return self


def hash_key(key: str) -> str:
    """The hash of a key in the keys file: the SHA-256 of its UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def new_key(name: str, expires: datetime | None = None, **limits: int | None) -> tuple[str, str]:
    """A fresh key and its entry for the keys file. Raises ConfigError for a name or limit that is out of range."""
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        entry = ApiKey(name=name, sha256=hash_key(key), expires=expires, **limits)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, ApiKey)) from error
    return key, yaml.safe_dump([entry.model_dump(exclude_none=True)], sort_keys=False)


def parse_keys(text: str, where: str) -> dict[str, ApiKey]:
    """The entries of a keys file by hash. Raises ConfigError with a line for each fault, beginning with `where`."""
    file = parse_yaml(text, where)
    try:
        keys = _Keys(keys=[] if file.data is None else file.data).keys
    except ValidationError as error:
        raise ConfigError(describe_faults(error, _Keys, file=file.below("keys"))) from error
    return {key.sha256: key for key in keys}


class KeyRing:
    """The keys of an application, kept up to date with their file. `clock`: for tests, seconds."""

    def __init__(self, config: ApiConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the keys can't be read."""
        self._file, self._clock = config.keys_file, clock
        self._checked = clock()
        self._version: Any = None
        if self._file is None:
            name = config.keys_env or ""
            if name not in os.environ:
                raise ConfigError(
                    f"api.keys_env: the ingress has no environment variable {name}: set it, for "
                    "example under ingress.ray_actor_options.runtime_env.env_vars"
                )
            self._keys = parse_keys(os.environ[name], f"environment variable {name}")
        else:
            self._version = _version(self._file)
            self._keys = read_keys(self._file)

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key, also if it has expired; None if there is none."""
        self._update()
        return self._keys.get(hash_key(key))

    def _update(self) -> None:
        """Read the file again if it has changed. If it can't be read, the keys stay as they were, and the log has an error."""
        if self._file is None or self._clock() - self._checked < _CHECK_SECONDS:
            return
        self._checked = self._clock()
        version = _version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._file)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys read from %s", len(self._keys), self._file)


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The entries of a keys file by hash. Raises ConfigError naming the file and what is wrong."""
    try:
        return parse_keys(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api.keys_file: cannot read {path}: {error}") from error


def _version(path: Path) -> Any:
    """A value that changes when the file changes, or a symbolic link to it, as with mounted secrets."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
