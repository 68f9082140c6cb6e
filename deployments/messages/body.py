"""Anthropic's bodies of POST /v1/messages and /v1/messages/count_tokens, and their conversion to a chat body."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.bodies.strict_model import ModelBody, StrictModel
from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.tools import ToolName
from orthrus.errors import RequestError


class _Block(StrictModel):
    cache_control: dict[str, Any] | None = None
    """Without effect: every prefix is cached."""


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


def _is_text(block: Any) -> Any:
    kind = block.get("type", "text") if isinstance(block, dict) else "text"
    if kind != "text":
        raise ValueError(f"type {kind!r} is not supported here: send text")
    return block


OnlyText = Annotated[TextBlock, BeforeValidator(_is_text)]


class ToolUseBlock(_Block):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[OnlyText] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block):
    """Thinking that only another server could read."""

    type: Literal["redacted_thinking"]
    data: str


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock,
    Field(discriminator="type"),
]


class Turn(StrictModel):
    """One message. Consecutive messages of one role are one turn to Anthropic, and stay apart here."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def chat_messages(self) -> list[dict[str, Any]]:
        """The turn as OpenAI's messages: tool results are messages of their own there."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        if self.role == "assistant":
            return [_assistant(self.content)]
        if not self.content:
            return [{"role": self.role, "content": ""}]
        messages: list[dict[str, Any]] = []
        texts: list[str] = []
        for block in self.content:
            match block:
                case ToolResultBlock():
                    result = {
                        "role": "tool",
                        "tool_call_id": block.tool_use_id,
                        "content": _text(block.content),
                    }
                    # Some chat templates pass it on to the model.
                    messages.append({**result, "is_error": True} if block.is_error else result)
                case TextBlock() if texts and messages[-1]["role"] == self.role:
                    texts.append(block.text)
                case TextBlock():
                    texts = [block.text]
                    messages.append({"role": self.role, "content": texts})
                case _:
                    raise RequestError(
                        f"messages: a block of type {block.type} belongs to the assistant, not to the {self.role}",
                        "messages",
                    )
        return [
            {**message, "content": "\n".join(message["content"])} if message["role"] == self.role else message
            for message in messages
        ]


def _assistant(blocks: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.input},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    if any(isinstance(block, ToolResultBlock) for block in blocks):
        raise RequestError(
            "messages: tool_result blocks belong to the user: send them in a user message", "messages"
        )
    message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


class ClientTool(_Block):
    """A tool that the client runs. The fields after `strict` have no effect."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_the_clients(cls, tool: Any) -> Any:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in (None, "custom"):
            raise ValueError(
                f"tools of type {kind!r} are Anthropic's own: remove it, or send a tool with input_schema"
            )
        return tool

    def chat_tool(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class ToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _tool_has_a_name(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise RequestError("tool_choice has a name if, and only if, its type is tool", "tool_choice")
        return self

    def chat_choice(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"any": "required"}.get(self.type, self.type)


class Thinking(StrictModel):
    """budget_tokens is not enforced: thinking ends where the model ends it, and counts towards max_tokens."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(StrictModel):
    model_config = ConfigDict(populate_by_name=True)

    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(StrictModel):
    user_id: str | None = None


class CountTokensBody(ModelBody):
    """POST /v1/messages/count_tokens: what makes up the prompt.

    Fields without effect are accepted, because Anthropic's clients send them by default.
    """

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: str | list[OnlyText] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # The older name of output_config.format.
    # Without effect.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    def chat(self) -> ChatBody:
        """The chat body that this body stands for. Raises RequestError."""
        try:
            return ChatBody.model_validate(self._chat_fields())
        except ValidationError as error:
            raise describe(error) from None

    def _chat_fields(self) -> dict[str, Any]:
        messages = [message for turn in self.messages for message in turn.chat_messages()]
        if self.system:
            messages.insert(0, {"role": "system", "content": _text(self.system)})
        choice = self.tool_choice
        fields = {
            "model": self.model,
            "messages": messages,
            "tools": [tool.chat_tool() for tool in self.tools or ()] or None,
            "tool_choice": choice.chat_choice() if choice is not None else None,
            "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
            # A last message of the assistant's is the beginning of the answer.
            "continue_final_message": messages[-1]["role"] == "assistant"
            and bool(messages[-1]["content"])
            and "tool_calls" not in messages[-1],
            # A client that did not ask for thinking expects text in the first block.
            "enable_thinking": self.thinking is not None and self.thinking.type != "disabled",
        }
        wanted = self.output_config.format if self.output_config is not None else None
        if (wanted := wanted or self.output_format) is not None:
            schema = {"type": "json_schema", "json_schema": {"schema": wanted.definition}}
            fields["response_format"] = schema
        return fields


class MessagesBody(CountTokensBody):
    """POST /v1/messages. `seed` and `schedule` are extensions. The same seed gives the same answer."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float = Field(default=1.0, ge=0.0, le=1.0)
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    schedule: str | None = None
    metadata: Metadata | None = None
    # Without effect.
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "max_tokens": self.max_tokens,
            # Agents put the conversation into the user's id.
            "prompt_cache_key": self.metadata.user_id if self.metadata is not None else None,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "schedule": self.schedule,
        }
