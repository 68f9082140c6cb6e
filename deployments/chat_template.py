"""From a conversation to a prompt, by the model's own chat template, and what to expect of the answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from deployments.answer_grammar import answer_grammar
from deployments.call_text import TOOL_CALL
from deployments.chat_body import ChatBody
from deployments.chat_output import END_THINK, THINK, ChatSplitter
from orthrus.errors import RequestError


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation's token ids, what makes the splitter of an answer's text, and the grammar that the answer must follow."""

    tokens: list[int]
    splitter: Callable[[], ChatSplitter]
    grammar: str | None


class ChatTemplate:
    """`tokenizer`: a Hugging Face one. Its template says whether the model knows tools and thinking."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template or ""
        self._thinks = THINK in template
        self._calls = TOOL_CALL in template
        # What chat_template_kwargs can't set, since it is not the template's.
        reserved = signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset({*reserved, "messages", "self"})

    def apply(self, body: ChatBody) -> ChatPrompt:
        """Render and tokenise the conversation.

        Raises RequestError where the model or its template can't do what is asked.
        """
        if self._tokenizer.chat_template is None:
            raise RequestError("this model has no chat template: use /v1/completions", "messages")
        tools = body.offered_tools
        if tools and not self._calls:
            raise RequestError("this model's chat template has no tools: remove them", "tools")
        try:
            text = self._tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
                tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=True,
                **self._variables(body),
            )
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error
        inside = self._thinks and text.rstrip().endswith(THINK)
        thought = text.rstrip().endswith(END_THINK)
        return ChatPrompt(
            list(self._tokenizer.encode(text, add_special_tokens=False)),
            partial(
                ChatSplitter,
                thinks=self._thinks,
                calls=bool(tools),
                one_call=body.parallel_tool_calls is False,
                inside_reasoning=inside,
            ),
            answer_grammar(
                body, self._tokenizer, thinks=self._thinks and not thought, inside_reasoning=inside
            ),
        )

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
