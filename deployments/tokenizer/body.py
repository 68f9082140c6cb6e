"""The bodies of POST /tokenize and /detokenize."""

from typing import Any

from pydantic import ValidationError, model_validator

from orthrus.deployments.bodies.faults import describe
from orthrus.deployments.bodies.strict_model import ModelBody
from orthrus.deployments.chat.body import ChatBody, ReasoningEffort
from orthrus.deployments.chat.messages import Message
from orthrus.deployments.chat.tools import Tool
from orthrus.errors import RequestError


class TokenizeBody(ModelBody):
    """POST /tokenize: the ids of a text (`prompt`), or of a chat (`messages` and what else shapes its prompt).

    model: may be left out, as there is only one; lm-eval does.
    """

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
        asked = ("messages", "tools", "reasoning_effort", "enable_thinking", "chat_template_kwargs")
        try:
            return ChatBody(**{name: getattr(self, name) for name in asked} | {"model": self.model or ""})
        except ValidationError as error:
            raise describe(error) from None


class DetokenizeBody(ModelBody):
    """POST /detokenize: the text of token ids, special tokens included."""

    tokens: list[int]
