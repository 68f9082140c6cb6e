"""What OpenAI's request bodies have in common, checked and turned into sampling parameters.

Names and defaults are OpenAI's, with vLLM's extra sampling parameters. An unknown field is refused by name: a misspelt parameter
that is silently ignored costs its user more than an error does.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orthrus.errors import RequestError
from orthrus.request import SEED_BITS, SamplingParams

# OpenAI's fields that are not served here, and what to do instead.
_UNSUPPORTED = {
    "audio": "this model writes text only: remove it",
    "function_call": "OpenAI has replaced it: send tool_choice",
    "functions": "OpenAI has replaced it: send tools",
    "moderation": "answers are not moderated here: remove it",
    "web_search_options": "there is no search here: remove it",
}
_TOKEN_ID = re.compile(r"[0-9]{1,18}")
# pydantic names the branch of a union in an error's path; the caller knows no such field.
_BRANCHES = {"str", "NamedToolChoice", "AllowedToolChoice"}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class Body(BaseModel):
    """What the endpoints that generate share. Numbers are strict: "0.5" is not 0.5."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    seed: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Accepted because clients send them as a matter of course; they change nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """Clients that dump their own models send null for what they leave out, fields that we lack included."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _options_need_stream(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_with(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Raises RequestError."""
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs can't be streamed: leave out stream, or ask /v1/completions for echo with logprobs",
                "prompt_logprobs",
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        bias = self.logit_bias or {}
        if not all(_TOKEN_ID.fullmatch(token) for token in bias):
            raise RequestError("logit_bias keys must be token ids", "logit_bias")
        return sampling_params(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): value for token, value in bias.items()},
            stop=tuple(stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=self.n,
        )


def sampling_params(**given: Any) -> SamplingParams:
    """Sampling parameters as both protocols have them; None is the default. Raises RequestError.

    top_k -1 keeps all tokens, as in vLLM. A negative seed, down to -2**63 as OpenAI allows, is 2**63 more of it.
    """
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if (seed := given.get("seed")) is not None and -(1 << SEED_BITS) <= seed < 0:
        given["seed"] = seed + (1 << SEED_BITS)
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def describe(error: ValidationError) -> RequestError:
    """One of pydantic's complaints as one of ours, its field by path."""
    # Every branch of a union complains; the one that got furthest into the value is what the caller meant.
    first = max(error.errors(), key=lambda complaint: len(complaint["loc"]))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    path = ".".join(
        str(part)
        for part in first["loc"]
        if part not in _BRANCHES and not (isinstance(part, str) and part.startswith("list["))
    )
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        if path in _UNSUPPORTED:
            return RequestError(f"{path} is not supported: {_UNSUPPORTED[path]}", path)
        return RequestError(f"unknown field {path!r}: remove it or correct its name", path)
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        said = f"type '{context['tag']}' is not supported here: send {context['expected_tags']}"
    return RequestError(f"{path}: {said}" if path else said, field)
