"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`, SGLang's fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from orthrus.deployments.bodies.strict_model import StrictModel
from orthrus.errors import RequestError
from orthrus.text.grammar import choice_grammar, json_grammar, json_rule, lark_grammar, regex_grammar


class JSONSchemaFormat(StrictModel):
    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class AnswerFormat(StrictModel):
    """`response_format`: free text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "AnswerFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                "response_format has json_schema if, and only if, its type is json_schema", "response_format"
            )
        return self

    @property
    def schema_asked_for(self) -> dict[str, Any] | bool | None:
        """What the answer must be valid under, None if it may be any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.definition if self.json_schema is not None else None


class StructuredOutputs(StrictModel):
    """`structured_outputs`: exactly one of its fields is given. A schema may be JSON text."""

    model_config = ConfigDict(populate_by_name=True)

    schema_given: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class Constraint:
    """What an answer must follow: JSON under `schema`, or the Lark grammar `grammar`. The request's field `param` asks for it."""

    param: str
    schema: dict[str, Any] | bool | None = None
    grammar: str | None = None

    @property
    def rule(self) -> str:
        """The right side of a Lark rule, for a text of which it is a part. Raises RequestError."""
        return (
            json_rule(self.schema, self.param) if self.schema is not None else f"%lark {{\n{self.grammar}\n}}"
        )

    @property
    def lark(self) -> str:
        """The grammar of an answer that consists of this alone. Raises RequestError."""
        return self.grammar if self.grammar is not None else json_grammar(self.schema, self.param)


def constraint_of(response_format: AnswerFormat | None, fields: Mapping[str, Any]) -> Constraint | None:
    """The one constraint of a request, None if it has none. Raises RequestError.

    fields: the values of `structured_outputs` and of the single-purpose fields (guided_json, ...), by name. None: not given.
    """
    given = [
        _constraint(name, *_part(name, value))
        for name, value in fields.items()
        if value is not None and value is not False
    ]
    if response_format is not None and (schema := response_format.schema_asked_for) is not None:
        given.append(Constraint("response_format", schema=schema))
    if len(given) > 1:
        names = " and ".join(constraint.param for constraint in given)
        raise RequestError(f"{names} can't both be followed: send one of them", given[0].param)
    return given[0] if given else None


CONSTRAINT_FIELDS = {
    "structured_outputs": "structured_outputs",
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "schema",
    "regex": "regex",
    "ebnf": "grammar",
}
"""Request fields that constrain an answer, and what each one holds."""


def _part(name: str, value: Any) -> tuple[str, Any]:
    """The kind of constraint that a field asks for, and its value."""
    if not isinstance(value, StructuredOutputs):
        return CONSTRAINT_FIELDS[name], value
    parts = {
        "schema": value.schema_given,
        "json_object": value.json_object or None,
        "regex": value.regex,
        "choice": value.choice,
        "grammar": value.grammar,
    }
    given = [(kind, part) for kind, part in parts.items() if part is not None]
    if len(given) != 1:
        raise RequestError(
            "structured_outputs has exactly one of json, json_object, regex, choice and grammar", name
        )
    return given[0]


def _constraint(name: str, kind: str, value: Any) -> Constraint:
    match kind:
        case "schema":
            return Constraint(name, schema=_schema(name, value))
        case "json_object":
            return Constraint(name, schema={"type": "object"})
        case "regex":
            return Constraint(name, grammar=regex_grammar(value, name))
        case "choice":
            return Constraint(name, grammar=choice_grammar(value, name))
        case _:
            return Constraint(name, grammar=lark_grammar(value, name))


def _schema(name: str, value: dict[str, Any] | bool | str) -> dict[str, Any] | bool:
    """A JSON Schema that may be given as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name} must be a JSON Schema: {error}", name) from None
    if not isinstance(value, dict | bool):
        raise RequestError(f"{name} must be a JSON Schema: an object, true or false", name)
    return value
