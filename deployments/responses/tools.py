"""`tools` and `tool_choice` of OpenAI's Responses API, and the functions that stand for them in a chat body."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from jiter import from_json
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from orthrus.deployments.bodies.strict_model import StrictModel
from orthrus.deployments.chat.tools import LONGEST_NAME, ToolName
from orthrus.errors import RequestError

HostedKind = Literal[
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
]


class _NamedTool(StrictModel):
    """defer_loading, allowed_callers: without effect."""

    name: ToolName
    description: str | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class FunctionTool(_NamedTool):
    """A function that the model may call. output_schema: without effect."""

    type: Literal["function"]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = None

    def definition(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }


class InputFormat(StrictModel):
    """The format of a custom tool's input. It is described to the model, but not enforced."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _grammar_goes_with_its_type(self) -> "InputFormat":
        has = (self.syntax is not None, self.definition is not None)
        if has != (self.type == "grammar",) * 2:
            raise RequestError(
                "tools: a format has a syntax and a definition if, and only if, its type is grammar", "tools"
            )
        return self


class CustomTool(_NamedTool):
    """A tool that takes a text. To the model it is a function with the text as its only argument, `input`."""

    type: Literal["custom"]
    format: InputFormat | None = None

    def definition(self) -> dict[str, Any]:
        told = [self.description] if self.description else []
        if self.format is not None and self.format.type == "grammar":
            told.append(f"The input follows this {self.format.syntax} grammar:\n{self.format.definition}")
        return {
            "name": self.name,
            "description": "\n\n".join(told) or None,
            "parameters": {
                "type": "object",
                "properties": {"input": {"type": "string"}},
                "required": ["input"],
                "additionalProperties": False,
            },
            "strict": True,
        }


def qualified(name: str, namespace: str | None) -> str:
    """A tool's name for the model, which includes its namespace."""
    return f"{namespace}.{name}" if namespace else name


_HOSTED = get_args(HostedKind)
_BRANCHES = {"custom": "CustomTool", "namespace": "NamespaceTool", **dict.fromkeys(_HOSTED, "HostedTool")}


def _branch(tool: Any) -> str:
    """The tag of a tool's class in a union. Paths in errors leave it out."""
    return _BRANCHES.get(tool.get("type"), "FunctionTool") if isinstance(tool, dict) else "FunctionTool"


def _of_type(*types: str) -> BeforeValidator:
    """A validator that refuses objects of other types. The error names the types."""

    def check(given: Any) -> Any:
        kind = given.get("type", types[0]) if isinstance(given, dict) else types[0]
        if kind not in types:
            known = " or ".join(repr(name) for name in types if name not in _HOSTED)
            raise ValueError(f"type {kind!r} is not supported here: send {known}")
        return given

    return BeforeValidator(check)


_Function = Annotated[FunctionTool, Tag("FunctionTool")]
_Custom = Annotated[CustomTool, Tag("CustomTool")]
_Nested = Annotated[_Function | _Custom, Discriminator(_branch)]


class NamespaceTool(StrictModel):
    """Tools under a common name, which is the `namespace` of their calls."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: list[Annotated[_Nested, _of_type("function", "custom")]]

    @model_validator(mode="after")
    def _names_are_short_enough(self) -> "NamespaceTool":
        for tool in self.tools:
            if len(name := qualified(tool.name, self.name)) > LONGEST_NAME:
                raise RequestError(
                    f"tools: {name!r} has over {LONGEST_NAME} characters: shorten the name of the namespace or of the tool",
                    "tools",
                )
        return self


class HostedTool(StrictModel):
    """A tool that OpenAI runs, or that only its models know how to use. It is left out of the prompt."""

    model_config = ConfigDict(extra="allow")

    type: HostedKind


_Namespace = Annotated[NamespaceTool, Tag("NamespaceTool")]
_Hosted = Annotated[HostedTool, Tag("HostedTool")]
_AnyTool = Annotated[_Function | _Custom | _Namespace | _Hosted, Discriminator(_branch)]
ResponsesTool = Annotated[_AnyTool, _of_type("function", "custom", "namespace", *_HOSTED)]


class NamedChoice(StrictModel):
    """The one tool that must be called."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class AllowedTools(StrictModel):
    """Some of the tools, to choose from freely or to call at least one of."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Annotated[NamedChoice, _of_type("function", "custom")]]


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | Annotated[NamedChoice | AllowedTools, Field(discriminator="type")],
    _of_type("function", "custom", "allowed_tools"),
]


@dataclass(frozen=True)
class OfferedTool:
    """A tool as it is described to the model: `function`, as a chat body has it. path: the tool's path in the body."""

    function: dict[str, Any]
    path: str
    name: str
    namespace: str | None
    custom: bool


def offered_tools(tools: Sequence[ResponsesTool], path: str) -> list[OfferedTool]:
    """The tools that are described to the model, including those in namespaces. A namespace's description goes to its first tool.

    path: the path of the list in the body.
    """
    offered = []
    for i, tool in enumerate(tools):
        match tool:
            case NamespaceTool():
                about = f"{tool.name}: {tool.description}" if tool.description else None
                for j, inner in enumerate(tool.tools):
                    offered.append(_offered(inner, f"{path}[{i}].tools[{j}]", tool.name, about))
                    about = None
            case FunctionTool() | CustomTool():
                offered.append(_offered(tool, f"{path}[{i}]"))
    return offered


def _offered(
    tool: FunctionTool | CustomTool, path: str, namespace: str | None = None, about: str | None = None
) -> OfferedTool:
    function = {**tool.definition(), "name": qualified(tool.name, namespace)}
    if about is not None:
        function["description"] = "\n\n".join(filter(None, (about, function["description"])))
    return OfferedTool(function, path, tool.name, namespace, isinstance(tool, CustomTool))


def chat_choice(choice: ToolChoice | None) -> Any:
    """The same choice in the terms of a chat."""
    match choice:
        case NamedChoice():
            return {"type": "function", "function": {"name": qualified(choice.name, choice.namespace)}}
        case AllowedTools():
            allowed = {"mode": choice.mode, "tools": [chat_choice(tool) for tool in choice.tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def custom_arguments(text: str) -> str:
    """A custom tool's input as the JSON arguments of the function that the tool is to the model."""
    return json.dumps({"input": text})


def custom_input(arguments: str) -> str:
    """The text given to a custom tool, as far as the arguments have come; "" before it begins."""
    try:
        given = from_json(arguments.encode(), partial_mode="trailing-strings")
    except ValueError:
        return ""
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else ""
