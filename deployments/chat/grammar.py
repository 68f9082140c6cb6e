"""The grammar of a chat answer: what `response_format` and `tool_choice` ask for, after any thinking."""

import json
from typing import Any

from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.call_text import END_TOOL_CALL, TOOL_CALL
from orthrus.deployments.chat.output import END_THINK, THINK
from orthrus.deployments.chat.tools import NamedToolChoice, Tool
from orthrus.errors import RequestError
from orthrus.text.grammar import MAX_GRAMMAR_CHARACTERS, json_rule

# Keywords by which a schema says more of an object's properties than `properties` does.
_OTHER_PROPERTIES = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies", "minProperties"),
}


def answer_grammar(body: ChatBody, tokenizer: Any, *, thinks: bool, inside_reasoning: bool) -> str | None:
    """A Lark grammar for `orthrus.text.grammar`, None where any text will do.

    thinks: the answer may open with `<think>...</think>`. inside_reasoning: the prompt has opened it already.
    """
    constraint = body.constraint
    rules: dict[str, str] = {}
    tools = body.callable_tools
    many = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedToolChoice)
    if body.must_call:
        rules |= _calls(body, tokenizer, many=many)
        start = "calls"
    elif constraint is not None:
        rules["constrained"] = constraint.rule
        start = "constrained"
        if tools:
            rules |= _calls(body, tokenizer, many=many)
            start = "(constrained | calls)"
    elif any(tool.function.strict for tool in tools) and TOOL_CALL in tokenizer.get_added_vocab():
        # A marker that is a token of its own is no text.
        rules |= _calls(body, tokenizer, many=many, only_strict=True)
        rules["TEXT"] = r"/(.|\n)+/"
        start = "TEXT? (call TEXT?)*" if many else "TEXT? (call TEXT?)?"
    else:
        return None
    if thinks or inside_reasoning:
        rules |= _reasoning(tokenizer, inside_reasoning)
        # Models leave a line empty between their thoughts and the answer.
        rules["LINES"] = r"/\n{1,2}/"
        start = f"reasoning LINES? {start}" if inside_reasoning else f"(reasoning LINES?)? {start}"
    return "\n".join(f"{name}: {rule}" for name, rule in {"start": start, **rules}.items())


def _calls(body: ChatBody, tokenizer: Any, *, many: bool, only_strict: bool = False) -> dict[str, str]:
    """Rules for one call, or one after the other, of any of the callable tools.

    only_strict: arguments of tools that are not `strict` may be any object. Raises RequestError naming the parameters.
    """
    callable_names = {tool.function.name for tool in body.callable_tools}
    tools = {i: tool for i, tool in enumerate(body.tools or ()) if tool.function.name in callable_names}
    rules = {"calls": r'call ("\n" call)*' if many else "call"}
    rules["call"] = f"{_marker(tokenizer, TOOL_CALL)} (" + " | ".join(f"call_{i}" for i in tools) + ")"
    rules["call"] += f" {_marker(tokenizer, END_TOOL_CALL)}"
    size = 0
    for i, tool in tools.items():
        head = json.dumps(f'\n{{"name": "{tool.function.name}", "arguments": ')
        rules[f"call_{i}"] = f'{head} arguments_{i} "}}\\n"'
        free = only_strict and not tool.function.strict
        schema = {"type": "object"} if free else _arguments_schema(tool)
        param = f"tools[{i}].function.parameters"
        rules[f"arguments_{i}"] = '"{}"' if schema is None else json_rule(schema, param)
        size += len(rules[f"arguments_{i}"])
        if size > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"the parameters of the tools make a grammar of over {MAX_GRAMMAR_CHARACTERS} characters: offer fewer of them",
                "tools",
            )
    return rules


def _arguments_schema(tool: Tool) -> dict[str, Any] | None:
    """The schema of a tool's arguments, which are an object whatever its parameters say; None if they are `{}`.

    Properties that the parameters don't name are allowed only where they say so: models would make them up.
    """
    given = tool.function.parameters
    if not given:
        return None
    schema: dict[str, Any] = {**(_object_part(given) if isinstance(given, dict) else {}), "type": "object"}
    parts = schema.get("allOf", [])
    if "$ref" in schema and isinstance(parts, list):
        # Up to JSON Schema's draft 7 it hides what stands beside it.
        schema["allOf"] = [*parts, {"$ref": schema.pop("$ref")}]
    if "properties" in schema and not _OTHER_PROPERTIES & schema.keys():
        schema["additionalProperties"] = False
    return schema


def _object_part(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without the choices that no object can be."""
    kept = dict(schema)
    for name in ("anyOf", "oneOf", "enum"):
        if isinstance(options := schema.get(name), list):
            kept[name] = [option for option in options if _may_be_object(option, of_values=name == "enum")]
            if not kept[name]:
                del kept[name]
    if not isinstance(kept.get("const", {}), dict):
        del kept["const"]
    return kept


def _may_be_object(option: Any, *, of_values: bool) -> bool:
    if of_values:
        return isinstance(option, dict)
    types = option.get("type", "object") if isinstance(option, dict) else "object"
    return "object" in (types if isinstance(types, list) else [types])


def _reasoning(tokenizer: Any, inside: bool) -> dict[str, str]:
    opening = "" if inside else f"{_marker(tokenizer, THINK)} "
    end = _marker(tokenizer, END_THINK)
    if end == END_THINK:
        return {"reasoning": rf"{opening}/(.|\n)*/ {end}"}
    # Spelled with ordinary tokens, the end must be looked for in the text.
    return {"reasoning": f"{opening}thoughts", f"thoughts[suffix={end}]": r"/(.|\n)*/"}


def _marker(tokenizer: Any, marker: str) -> str:
    """A marker in a grammar: by its name where it is a token of its own, else as the text that it is."""
    return marker if marker in tokenizer.get_added_vocab() else json.dumps(marker)
