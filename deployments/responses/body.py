"""OpenAI's body of POST /v1/responses, and its conversion to a chat body."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from orthrus.deployments.bodies.body import Body
from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.bodies.strict_model import StrictModel
from orthrus.deployments.chat.body import ChatBody, ReasoningEffort
from orthrus.deployments.responses.items import AdditionalToolsItem, Item, MessageItem, chat_messages
from orthrus.deployments.responses.tools import (
    HostedTool,
    OfferedTool,
    ResponsesTool,
    ToolChoice,
    chat_choice,
    offered_tools,
)
from orthrus.errors import RequestError

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
_SENT_AS = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "response_format": "text.format",
}
# Values of `include` about tools that do not exist here. They are accepted, and nothing is included.
_NOTHING_TO_INCLUDE = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


class TextFormat(StrictModel):
    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.definition is not None):
            raise RequestError("text.format has a schema if, and only if, its type is json_schema", "text")
        return self

    def chat_format(self) -> dict[str, Any]:
        if self.definition is None:
            return {"type": self.type}
        schema = {"name": self.name, "schema": self.definition}
        return {"type": self.type, "json_schema": schema}


class TextConfig(StrictModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(StrictModel):
    """summary, generate_summary (its older name): reasoning is the item's summary, whole, instead of its content."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


def _refuse(instead: str) -> AfterValidator:
    """A validator for a field that is not supported: null and false are accepted, else the error says what to do instead."""

    def check(value: Any) -> Any:
        if value:
            raise ValueError(instead)
        return value

    return AfterValidator(check)


class ResponsesBody(Body):
    """POST /v1/responses, with the sampling parameters of the other endpoints besides OpenAI's."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[ResponsesTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal[LOGPROBS, ENCRYPTED_REASONING, *_NOTHING_TO_INCLUDE]] | None = None  # type: ignore[valid-type]
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    previous_response_id: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    client_metadata: dict[str, Any] | None = None  # Codex' own, without effect.
    max_tool_calls: int | None = None  # Of tools that run on the server: there are none.
    n: Literal[1] | None = None
    background: Annotated[
        bool | None, _refuse("answers are not made in the background here: stream them")
    ] = None
    conversation: Annotated[Any, _refuse("conversations are not kept here: send the items as input")] = None
    prompt: Annotated[Any, _refuse("prompts are not kept here: send instructions and input")] = None

    @model_validator(mode="after")
    def _asks_for_nothing_of_other_endpoints(self) -> "ResponsesBody":
        for name in (
            "prompt_logprobs",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "return_drafts",
            "request_id",
        ):
            if getattr(self, name):
                raise RequestError(f"{name} is not for responses: send it to /v1/chat/completions", name)
        return self

    @model_validator(mode="after")
    def _choice_leaves_a_tool_to_call(self) -> "ResponsesBody":
        if self.tools and not self.offered() and self.tool_choice not in (None, "none", "auto"):
            raise RequestError(
                "tool_choice needs a function or custom tool: hosted tools do not run here", "tool_choice"
            )
        return self

    def offered(self, before: Sequence[Item] = ()) -> list[OfferedTool]:
        """The tools that are described to the model. before: the items of earlier turns.

        A tool replaces one of the same name in an earlier list.
        """
        offered: dict[str, list[OfferedTool]] = {}
        for path, tools in [*_tools_in(before, "previous_response_id"), *self._tools]:
            later = offered_tools(tools, path)
            for tool in later:
                offered.pop(tool.function["name"], None)
            for tool in later:
                offered.setdefault(tool.function["name"], []).append(tool)
        return [tool for tools_of_name in offered.values() for tool in tools_of_name]

    @property
    def _tools(self) -> list[tuple[str, Sequence[ResponsesTool]]]:
        """The lists of tools in this body, each with its path."""
        return [("tools", self.tools or ()), *_tools_in(self.items, "input")]

    @property
    def left_out(self) -> list[str]:
        """The paths of tools in the body that are left out, because they do not run here."""
        return [
            f"{path}[{i}]"
            for path, tools in self._tools
            for i, tool in enumerate(tools)
            if isinstance(tool, HostedTool)
        ]

    def field_names(self, before: Sequence[Item] = ()) -> dict[str, str]:
        """Maps names of fields in a chat body, which errors have, to those in this body. before: the items of earlier turns."""
        offered = enumerate(self.offered(before))
        parameters = {f"tools[{i}].function.parameters": f"{tool.path}.parameters" for i, tool in offered}
        return {**_SENT_AS, **parameters}

    @property
    def includes(self) -> Sequence[str]:
        return self.include or ()

    @property
    def items(self) -> list[Item]:
        """This turn's input. A text is a message of the user."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def summarises(self) -> bool:
        """Whether reasoning is to come as a summary."""
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    def chat(self, before: Sequence[Item] = ()) -> ChatBody:
        """The chat body that this body stands for. before: the items of earlier turns. Raises RequestError."""
        messages = chat_messages([*before, *self.items])
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if not messages:
            raise RequestError("input must have at least one item", "input")
        # Sampling parameters, and the like, that have the same names in a chat.
        shared = self.model_fields_set & Body.model_fields.keys() & ChatBody.model_fields.keys()
        format_ = self.text.format if self.text is not None else None
        wanted = {"response_format": format_.chat_format()} if format_ is not None else {}
        try:
            return ChatBody.model_validate(
                {
                    **{name: getattr(self, name) for name in shared - {"stream", "stream_options"}},
                    "messages": messages,
                    "max_completion_tokens": self.max_output_tokens,
                    "tools": [
                        {"type": "function", "function": tool.function} for tool in self.offered(before)
                    ]
                    or None,
                    "tool_choice": chat_choice(self.tool_choice),
                    "parallel_tool_calls": self.parallel_tool_calls,
                    **wanted,
                    "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
                    "enable_thinking": self.enable_thinking,
                    "chat_template_kwargs": self.chat_template_kwargs,
                    "logprobs": LOGPROBS in self.includes,
                    "top_logprobs": self.top_logprobs if LOGPROBS in self.includes else None,
                }
            )
        except ValidationError as error:
            raise describe(error) from None


def _tools_in(items: Sequence[Item], path: str) -> list[tuple[str, Sequence[ResponsesTool]]]:
    """The lists of tools in the items, each with its path. path: that of the items."""
    return [
        (f"{path}[{i}].tools", item.tools)
        for i, item in enumerate(items)
        if isinstance(item, AdditionalToolsItem)
    ]
