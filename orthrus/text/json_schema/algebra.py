"""Combine two cleaned JSON Schemas, and find out whether they exclude each other."""

import json
from collections.abc import Callable
from typing import Any

from orthrus.text.json_schema.keywords import TYPES, Schema, SchemaError

_LARGER = ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum")
_SMALLER = ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum")


def types_of(schema: Schema) -> frozenset[str]:
    """The types that a schema allows. "integer" is among them only if the schema names it."""
    given = schema.get("type", TYPES)
    return frozenset([given] if isinstance(given, str) else given)


def merged(one: Schema, other: Schema) -> Schema:
    """A schema for the values that both accept. Its subschemas may have `allOf`. Raises SchemaError if it can't be written."""
    both = {**one, **other}
    for name in one.keys() & other.keys():
        if one[name] != other[name] or name in ("anyOf", "oneOf"):
            both[name] = _merged_keyword(name, one[name], other[name])
    if "type" in one and "type" in other:
        both["type"] = _common_types(types_of(one), types_of(other))
    if ("enum" in one or "const" in one) and ("enum" in other or "const" in other):
        both.pop("const", None)
        theirs = {_canonical(value) for value in constants(other)}
        both["enum"] = [value for value in constants(one) if _canonical(value) in theirs]
        if not both["enum"]:
            raise SchemaError("its parts have no value in common")
    if ("properties" in one or "properties" in other) or "additionalProperties" in both:
        both |= _merged_properties(one, other)
    return both


def constants(schema: Schema) -> list[Any]:
    """The values that `enum` and `const` leave."""
    if "enum" not in schema:
        return [schema["const"]]
    if "const" in schema:
        return [value for value in schema["enum"] if _canonical(value) == _canonical(schema["const"])]
    values: list[Any] = schema["enum"]
    return values


def _merged_keyword(name: str, one: Any, other: Any) -> Any:
    if name in _LARGER:
        return max(one, other)
    if name in _SMALLER:
        return min(one, other)
    if name == "required":
        return list(dict.fromkeys([*one, *other]))
    if name == "items":
        return {"allOf": [one, other]}
    if name in ("type", "enum", "const", "properties", "additionalProperties"):
        return other  # See `merged`.
    raise SchemaError(
        f"{name} stands twice in what must hold together (allOf, $ref, anyOf): put it in one place"
    )


def _common_types(one: frozenset[str], other: frozenset[str]) -> list[str]:
    common = one & other
    if ("integer" in one and "number" in other) or ("integer" in other and "number" in one):
        common |= {"integer"}
    if not common:
        raise SchemaError("its parts have no type in common")
    return sorted(common)


def _merged_properties(one: Schema, other: Schema) -> Schema:
    """`properties` and `additionalProperties` of both together."""
    if "patternProperties" in one or "patternProperties" in other:
        if (
            ("patternProperties" in one and "patternProperties" in other)
            or "properties" in one
            or "properties" in other
        ):
            raise SchemaError("patternProperties can't be combined with the properties of another part")
        return {}
    mine, theirs = one.get("properties", {}), other.get("properties", {})
    rest = [schema.get("additionalProperties", True) for schema in (one, other)]
    properties = {}
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        both = [mine.get(name, rest[0]), theirs.get(name, rest[1])]
        properties[name] = both_of(*both)
    found: Schema = {"properties": properties} if properties else {}
    if "additionalProperties" in one or "additionalProperties" in other:
        found["additionalProperties"] = both_of(*rest)
    return found


def both_of(one: Schema | bool, other: Schema | bool) -> Schema | bool:
    """A schema for the values that both accept. It may have `allOf`."""
    if one is False or other is False:
        return False
    if one is True or one == other:
        return other
    return one if other is True else {"allOf": [one, other]}


def exclusive(
    one: Schema | bool, other: Schema | bool, flat: Callable[[Any], Schema | bool], depth: int = 3
) -> bool:
    """Whether no value that is written for `one` is valid under `other`. False if that can't be told.

    Both are flat, which means without `$ref` and `allOf`. flat: makes a subschema flat. An object that names its properties is
    written without others. depth: how many levels of properties to look into.
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is False or other is False
    for name in ("anyOf", "oneOf"):
        if name in one:
            return all(exclusive(flat(option), other, flat, depth) for option in one[name])
        if name in other:
            return all(exclusive(one, flat(option), flat, depth) for option in other[name])
    mine, theirs = ("enum" in schema or "const" in schema for schema in (one, other))
    if mine and theirs:
        known = {_canonical(value) for value in constants(other)}
        return not any(_canonical(value) in known for value in constants(one))
    if mine or theirs:
        listed, free = (one, other) if mine else (other, one)
        return not any(_has_type(value, types_of(free)) for value in constants(listed))
    common = _kinds(one) & _kinds(other)
    return not common or (common == {"object"} and depth > 0 and _objects_exclude(one, other, flat, depth))


def _kinds(schema: Schema) -> set[str]:
    """The types, with "integer" counted as "number". No value has two of these."""
    return {"number" if name == "integer" else name for name in types_of(schema)}


def _objects_exclude(one: Schema, other: Schema, flat: Callable[[Any], Schema | bool], depth: int) -> bool:
    mine, theirs = one.get("properties", {}), other.get("properties", {})
    closed = bool(mine) and one.get("additionalProperties", False) is False and "patternProperties" not in one
    if closed and any(name not in mine for name in other.get("required", ())):
        return True
    strict = other.get("additionalProperties") is False and "patternProperties" not in other
    if strict and any(name not in theirs for name in one.get("required", ())):
        return True
    return any(
        exclusive(flat(mine[name]), flat(theirs[name]), flat, depth - 1)
        for name in other.get("required", ())
        if name in mine and name in theirs
    )


def _has_type(value: Any, types: frozenset[str]) -> bool:
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int() | float():
            return "number" in types or ("integer" in types and value == int(value))
        case str():
            return "string" in types
        case list():
            return "array" in types
        case _:
            return "object" in types


def _canonical(value: Any) -> str:
    """A text that is the same for values that are equal in JSON Schema: 1 equals 1.0, and true does not equal 1."""
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return json.dumps(value, sort_keys=True)
