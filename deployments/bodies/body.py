"""The common part of OpenAI's request bodies: its checks, and its conversion to sampling parameters.

Names and defaults are OpenAI's, with vLLM's extra sampling parameters. An unknown field is refused by name: a misspelt parameter
that is silently ignored costs its user more than an error does.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from orthrus.deployments.bodies.answer_format import (
    CONSTRAINT_FIELDS,
    AnswerFormat,
    Constraint,
    StructuredOutputs,
    constraint_of,
)
from orthrus.deployments.bodies.strict_model import ModelBody, StrictModel
from orthrus.deployments.bodies.unsupported_fields import drop_neutral
from orthrus.errors import RequestError
from orthrus.requests.request import SEED_BITS, SamplingParams
from orthrus.schedules.registry import AR

_TOKEN_ID = re.compile(r"[0-9]{1,18}")
_REQUEST_ID = r"^[!-~]{1,128}$"


class StreamOptions(StrictModel):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False


@dataclass(frozen=True)
class AnswerOptions:
    """What the answer shows besides the text. Names are those of the request's fields."""

    include_usage: bool = False
    continuous_usage: bool = False
    """Whether every event counts the tokens so far."""
    obfuscation: bool = False
    """Whether events are padded, to hide the length of their text."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_drafts: bool = False
    include_reasoning: bool = True
    request_id: str | None = None


def _first_bias_is_told(biases: Any) -> Any:
    """Refuse biases that are no numbers by the first of them: pydantic would report each one, and there may be very many."""
    for token, bias in biases.items() if isinstance(biases, dict) else ():
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"the bias of token {token!r} must be a number")
    return biases


class Body(ModelBody):
    """What the endpoints that generate share."""

    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    seed: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_first_bias_is_told)] = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    schedule: str | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: AnswerFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    return_drafts: bool | None = False
    priority: int | None = 0
    cache_salt: str | None = None
    request_id: str | None = Field(default=None, pattern=_REQUEST_ID)
    # Accepted because clients send them by default. They change nothing in the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    guided_decoding_backend: str | None = None
    spaces_between_special_tokens: bool | None = None
    return_cached_tokens_details: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_what_there_is(cls, data: Any) -> Any:
        return drop_neutral(data, cls.model_fields) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _options_go_together(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        if self.return_drafts and not self.stream:
            raise RequestError(
                "return_drafts needs stream to be true: each event has its own cycles", "return_drafts"
            )
        if self.return_drafts and self.schedule == AR:
            raise RequestError(
                "return_drafts needs drafts, and schedule ar makes none: remove one of the two",
                "return_drafts",
            )
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens not in range(-1, 1 << 31):
            raise RequestError(
                "truncate_prompt_tokens must be positive, or -1 for what the context holds",
                "truncate_prompt_tokens",
            )
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must keep at least one token", "truncate_prompt_tokens"
            )
        return self

    @cached_property
    def constraint(self) -> Constraint | None:
        """What the answer must follow. Raises RequestError."""
        return constraint_of(self.response_format, {name: getattr(self, name) for name in CONSTRAINT_FIELDS})

    @property
    def options(self) -> AnswerOptions:
        stream = self.stream_options or StreamOptions()
        return AnswerOptions(
            include_usage=bool(stream.include_usage),
            continuous_usage=bool(stream.continuous_usage_stats),
            obfuscation=bool(stream.include_obfuscation),
            return_token_ids=bool(self.return_token_ids),
            return_tokens_as_token_ids=bool(self.return_tokens_as_token_ids),
            return_drafts=bool(self.return_drafts),
            request_id=self.request_id,
        )

    @property
    def sent_as(self) -> dict[str, str]:
        """Maps names of fields, as errors have them, to the names in this request."""
        return {"response_format": self.constraint.param} if self.constraint is not None else {}

    def truncated(self, tokens: list[int], context: int, max_tokens: int | None) -> list[int]:
        """The last tokens of a prompt, as many as truncate_prompt_tokens says, else all. context: the model's limit of tokens."""
        keep = self.truncate_prompt_tokens
        if keep == -1:
            keep = max(1, context - max(1, max_tokens or 1))
        return tokens if keep is None else tokens[-keep:]

    def sampling_with(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The body's sampling parameters, with these values. Raises RequestError."""
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
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            schedule=self.schedule,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=self.n,
            return_drafts=self.return_drafts,
        )


def sampling_params(**given: Any) -> SamplingParams:
    """Sampling parameters from values as both protocols have them. None stands for the default. Raises RequestError.

    top_k -1 keeps all tokens, as in vLLM. To a negative seed, which may be as low as -2**63 as in OpenAI's API, 2**63 is added.
    """
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if (seed := given.get("seed")) is not None and -(1 << SEED_BITS) <= seed < 0:
        given["seed"] = seed + (1 << SEED_BITS)
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
