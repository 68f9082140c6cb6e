"""The body of POST /v1/chat/completions."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator

from orthrus.deployments.bodies.body import AnswerOptions, Body
from orthrus.deployments.bodies.strict_model import StrictModel
from orthrus.deployments.chat.messages import Message
from orthrus.deployments.chat.tools import AllowedToolChoice, NamedToolChoice, Tool
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(StrictModel):
    """`reasoning`, as OpenRouter and OpenAI's newer API have it. exclude: leave it out of the answer."""

    effort: ReasoningEffort | None = None
    enabled: bool | None = None
    exclude: bool | None = None


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
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: ReasoningEffort | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = True
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _ends_one_way(self) -> "ChatBody":
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt can't both be true: the answer either goes on with the last "
                "message or begins a new one",
                "continue_final_message",
            )
        if self.continue_final_message and not (self.messages and self.messages[-1].text):
            raise RequestError(
                "continue_final_message needs a last message with text to go on with",
                "continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _choice_is_of_the_tools(self) -> "ChatBody":
        if not self.messages:
            raise RequestError("messages must have at least one message", "messages")
        names = {tool.function.name for tool in self.tools or ()}
        if len(names) < len(self.tools or ()):
            raise RequestError("each tool must have a name of its own", "tools")
        choice = self.tool_choice
        if not names and choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools: send them, or leave it out", "tool_choice")
        for name in self._chosen_names or ():
            if name not in names:
                raise RequestError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
        return self

    @property
    def _chosen_names(self) -> dict[str, None] | None:
        """Names of the tools that tool_choice allows, in order; None if it allows all."""
        match self.tool_choice:
            case NamedToolChoice() as named:
                return {named.function.name: None}
            case AllowedToolChoice() as some:
                return {named.function.name: None for named in some.allowed_tools.tools}
        return None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that are described to the model."""
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
        """Whether the model should think before it answers. None: the chat template decides."""
        reasoning = self.reasoning or Reasoning()
        for switch in (self.enable_thinking, reasoning.enabled):
            if switch is not None:
                return switch
        effort = self.reasoning_effort or reasoning.effort
        return None if effort is None else effort != "none"

    @property
    def options(self) -> AnswerOptions:
        excluded = self.include_reasoning is False or (
            self.reasoning is not None and bool(self.reasoning.exclude)
        )
        return replace(super().options, include_reasoning=not excluded)

    @property
    def sent_as(self) -> dict[str, str]:
        names = {**super().sent_as, "prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names

    @property
    def new_tokens(self) -> int | None:
        """How many tokens an answer may have, None for what the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        return self.sampling_with(self.new_tokens, self.alternatives, self.prompt_logprobs)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token, None to report no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
