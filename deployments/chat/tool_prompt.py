"""Tools for a model whose chat template knows none: the system message describes them, and calls and results are plain text."""

import json
from itertools import groupby
from typing import Any

from orthrus.deployments.chat.call_text import END_TOOL_CALL, TOOL_CALL

_BEFORE_TOOLS = """# Tools

You may call functions to answer the user. Each of these lines describes one, its parameters as a JSON Schema:
<tools>
"""
_AFTER_TOOLS = f"""
</tools>

To call a function, write its name and its arguments, a JSON object, in this form, once for each call:
{TOOL_CALL}
{{"name": "<function name>", "arguments": <arguments>}}
{END_TOOL_CALL}"""


def spelled_out(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in roles and texts alone, with a system message that describes `tools` where there are any.

    The results of one answer's calls are one message of the user, as in Qwen3's template.
    """
    spelled: list[dict[str, Any]] = []
    if tools:
        described = _BEFORE_TOOLS + "\n".join(map(_dumps, tools)) + _AFTER_TOOLS
        if messages and messages[0]["role"] == "system":
            described = f"{messages[0]['content']}\n\n{described}"
            messages = messages[1:]
        spelled.append({"role": "system", "content": described})
    for is_result, run in groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            spelled.append({"role": "user", "content": "\n".join(map(_result, run))})
        else:
            spelled += map(_with_calls, run)
    return spelled


def _result(message: dict[str, Any]) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls at the end of its content."""
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [
        f"{TOOL_CALL}\n{_dumps({key: call['function'][key] for key in ('name', 'arguments')})}\n{END_TOOL_CALL}"
        for call in message.get("tool_calls", ())
    ]
    return {**rest, "content": "\n".join(part for part in (message["content"], *calls) if part)}


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
