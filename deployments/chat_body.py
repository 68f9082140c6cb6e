"""The body of POST /v1/chat/completions."""

from typing import Any, Literal

from pydantic import model_validator

from deployments.answer_format import AnswerFormat, JSONSchemaFormat
from deployments.chat_messages import Message
from deployments.chat_tools import AllowedToolChoice, NamedToolChoice, Tool
from deployments.protocol import Body
from orthrus.errors import RequestError
from orthrus.request import SamplingParams

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatBody(Body):
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
        return self.sampling_with(limit, self.alternatives, self.prompt_logprobs)

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities of how many tokens to tell beside each one's own, None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
