"""`tools` and `tool_choice`, as OpenAI's API has them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from orthrus.deployments.bodies.strict_model import StrictModel

LONGEST_NAME = 128
"""Of a tool's name: the longest that any of the APIs allows."""
ToolName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_.-]{{1,{LONGEST_NAME}}}$")]


class FunctionDefinition(StrictModel):
    """A function of a tool.

    parameters: the JSON Schema of the arguments, which are always an object. Without a schema, or with an empty one, it is `{}`.
    strict: whether calls that are not forced follow the schema too.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | Literal[True] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it. They get all fields but `strict`."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class FunctionName(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolChoice(StrictModel):
    """Some of the tools, to choose from freely or to call at least one of."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
