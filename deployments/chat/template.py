"""Makes a conversation's prompt with the model's chat template, and what reads the answer: a splitter and a grammar."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.call_text import TOOL_CALL
from orthrus.deployments.chat.grammar import answer_grammar
from orthrus.deployments.chat.output import END_THINK, THINK, ChatSplitter
from orthrus.deployments.chat.tool_prompt import spelled_out
from orthrus.errors import RequestError
from orthrus.text.chat_limits import render_chat


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation's token ids, a function that makes a splitter for each choice's text, and the answer's grammar, if any."""

    tokens: list[int]
    splitter: Callable[[], ChatSplitter]
    grammar: str | None


class ChatTemplate:
    """`tokenizer`: a Hugging Face one. Its templates say whether the model knows tools and thinking."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # What chat_template_kwargs can't set: arguments of apply_chat_template, and the messages.
        reserved = signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset({*reserved, "messages", "self"})

    def apply(self, body: ChatBody) -> ChatPrompt:
        """Render and tokenise the conversation.

        Raises RequestError where the model or its template can't do what is asked.
        """
        tools = [tool.for_template() for tool in body.offered_tools]
        template = self._choose(tools)
        text = self._render(template, body, tools)
        thinks = THINK in template
        continued = body.messages[-1].text if body.continue_final_message else ""
        opened = text.rstrip().endswith(THINK) or continued.rfind(THINK) > continued.rfind(END_THINK)
        inside = thinks and opened
        # No reasoning comes if the prompt has ended it, or if the answer continues the text of a message.
        thought = text.rstrip().endswith(END_THINK) or bool(continued)
        return ChatPrompt(
            list(self._tokenizer.encode(text, add_special_tokens=False)),
            partial(
                ChatSplitter,
                thinks=thinks,
                calls=bool(tools),
                one_call=body.parallel_tool_calls is False,
                inside_reasoning=inside,
            ),
            answer_grammar(body, self._tokenizer, thinks=thinks and not thought, inside_reasoning=inside),
        )

    def _choose(self, tools: list[dict[str, Any]]) -> str:
        """The template that Hugging Face takes: of several named ones, "tool_use" if there are tools, else "default".

        Raises RequestError if there is none.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: use /v1/completions", "messages")
        try:
            return str(self._tokenizer.get_chat_template(tools=tools or None))
        except ValueError:
            names = ", ".join(sorted(self._tokenizer.chat_template))
            raise RequestError(
                f"this model's chat templates ({names}) have no default: use /v1/completions", "messages"
            ) from None

    def _render(self, template: str, body: ChatBody, tools: list[dict[str, Any]]) -> str:
        messages = [message.for_template() for message in body.messages]
        if not (TOOL_CALL in template and "tools" in template):
            messages, tools = spelled_out(messages, tools), []
        variables = self._variables(body)

        def render(messages: list[dict[str, Any]]) -> str:
            return render_chat(
                self._tokenizer,
                messages,
                chat_template=template,
                tools=tools or None,
                add_generation_prompt=body.add_generation_prompt is not False
                and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                **variables,
            )

        try:
            try:
                return render(messages)
            except TypeError:
                # The template may join arguments with other texts, so it gets them as text.
                return render([_with_texts_as_arguments(message) for message in messages])
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error

    def _variables(self, body: ChatBody) -> dict[str, Any]:
        """What the template is given besides messages and tools. Raises RequestError."""
        variables = dict(body.chat_template_kwargs or {})
        if taken := sorted(self._reserved.intersection(variables)):
            raise RequestError(
                f"chat_template_kwargs can't set {taken[0]!r}: remove it", "chat_template_kwargs"
            )
        if body.thinking is not None:
            variables["enable_thinking"] = body.thinking
        return variables


def _with_texts_as_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON text."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message
