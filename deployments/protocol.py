"""OpenAI's request bodies, checked and turned into sampling parameters.

Names and defaults are OpenAI's, with vLLM's extra sampling parameters. An unknown field is refused by name: a misspelt parameter
that is silently ignored costs its user more than an error does.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orthrus.errors import RequestError
from orthrus.request import SEED_BITS, SamplingParams

_MAX_CHOICES = 1024
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


class _Body(BaseModel):
    """What both endpoints share. Numbers are strict: "0.5" is not 0.5."""

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
    n: int | None = 1
    stream: bool | None = False
    stream_options: "StreamOptions | None" = None
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
    def _options_need_stream(self) -> "_Body":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises RequestError."""
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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class CompletionBody(_Body):
    """POST /v1/completions. `prompt` is a text, a list of texts, token ids, or a list of token id lists."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, at least one. Raises RequestError."""
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo gives no log-probabilities of the prompt: leave out echo or logprobs", "echo"
            )
        if self.suffix:
            raise RequestError(
                "suffix is not supported: the model only completes text from the left", "suffix"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                "best_of other than n is not supported: ask for n and choose on your side", "best_of"
            )
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt must not be an empty list", "prompt")
        many: Any = [prompt] if isinstance(prompt[0], int) else prompt
        choices = len(many) * (self.n or 1)
        if choices > _MAX_CHOICES:
            raise RequestError(
                f"prompts times n must be at most {_MAX_CHOICES} in one request, got {choices}", "prompt"
            )
        return many

    def sampling(self) -> SamplingParams:
        return self._sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs)


class ContentPart(BaseModel):
    """A piece of a message's text. OpenAI's refusals, which an assistant's message may have, are text as well."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""
    prompt_cache_breakpoint: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> "ContentPart":
        if self.type not in self.model_fields_set:
            raise ValueError(f"a part of type {self.type} has {self.type}")
        return self


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call that an earlier answer made; its arguments are JSON text, as the API gave them."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn. Keys that OpenAI doesn't have go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: plain text content; "developer" is OpenAI's newer name for "system"."""
        content = self.content
        text = (
            content
            if isinstance(content, str)
            else "".join(part.text + part.refusal for part in content or ())
        )
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": text}


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedToolChoice(BaseModel):
    """The one function that must be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionName


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolChoice(BaseModel):
    """Some of the tools, to choose from freely or to call at least one of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JSONSchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class AnswerFormat(BaseModel):
    """`response_format`: free text, any JSON object, or JSON under a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "AnswerFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format has json_schema if, and only if, its type is json_schema", "response_format"
            )
        return self


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: AnswerFormat | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _choice_is_of_the_tools(self) -> "ChatBody":
        if not self.messages:
            raise RequestError("messages must have at least one message", "messages")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError("each tool must have a name of its own", "tools")
        choice = self.tool_choice
        if not names and choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools: send them, or leave it out", "tool_choice")
        for name in self._chosen_names or ():
            if name not in names:
                raise RequestError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
        return self

    @property
    def _chosen_names(self) -> list[str] | None:
        """Names of the tools that tool_choice leaves, None if it leaves all."""
        match self.tool_choice:
            case NamedToolChoice() as named:
                return [named.function.name]
            case AllowedToolChoice() as some:
                return [named.function.name for named in some.allowed_tools.tools]
        return None

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the answer must be valid under, None if it may be any text."""
        match self.response_format:
            case AnswerFormat(type="json_object"):
                return {"type": "object"}
            case AnswerFormat(json_schema=JSONSchemaFormat() as given):
                return given.definition
        return None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        if self.tool_choice == "none":
            return []
        return self.callable_tools if isinstance(self.tool_choice, AllowedToolChoice) else self.tools or []

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        names = self._chosen_names
        return [tool for tool in self.tools or () if names is None or tool.function.name in names]

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        match self.tool_choice:
            case AllowedToolChoice() as some:
                return some.allowed_tools.mode == "required"
            case choice:
                return choice == "required" or isinstance(choice, NamedToolChoice)

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think before it answers, None if that is left to its template."""
        if self.enable_thinking is None and self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return self.enable_thinking

    def sampling(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)


class TokenizeBody(BaseModel):
    """POST /tokenize: the ids of a text (`prompt`), or of a chat (`messages` and what else shapes its prompt)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", "prompt")
        return self

    def chat(self) -> ChatBody:
        """The chat whose prompt is asked for. Raises RequestError."""
        asked = ("model", "messages", "tools", "reasoning_effort", "enable_thinking", "chat_template_kwargs")
        try:
            return ChatBody(**{name: getattr(self, name) for name in asked})
        except ValidationError as error:
            raise describe(error) from None


class DetokenizeBody(BaseModel):
    """POST /detokenize: the text of token ids, special tokens included."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    tokens: list[int]


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
    return RequestError(f"{path}: {first['msg']}" if path else first["msg"], field)
