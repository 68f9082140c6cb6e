"""JSON Schemas as clients send them, by what is special about each."""

from typing import Any

_KINDS = {
    kind: {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"
}
_TREE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
    },
    "required": ["value", "children"],
    "additionalProperties": False,
}
_NODE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "next": {"anyOf": [{"$ref": "#/definitions/node"}, {"type": "null"}]},
    },
    "required": ["name", "next"],
}
_PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"title": "Name", "type": "string"},
        "age": {"title": "Age", "type": "integer", "minimum": 0, "maximum": 150},
        "email": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}], "default": None},
    },
    "required": ["name", "age"],
}


def record(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "integer from 0": {"type": "integer", "minimum": 0},
    "large integer": {"type": "integer", "minimum": 10**17, "maximum": 10**18},
    "number": {"type": "number"},
    "number in a range": {"type": "number", "exclusiveMinimum": -1, "maximum": 2.5},
    "multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0},
    "string": {"type": "string"},
    "short string": {"type": "string", "minLength": 2, "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]+$"},
    "pattern anywhere": {"type": "string", "pattern": "[0-9]"},
    "date": {"type": "string", "format": "date"},
    "unknown format": record(format={"type": "string", "format": "color"}),
    "enum": {"enum": ["red", "green", 1, 2.5, None, True, {"a": [1, 2]}]},
    "const": record(version={"const": 3}, name={"const": 'a "b" é'}),
    "null": {"type": "null"},
    "nullable": {"type": ["string", "null"], "maxLength": 20},
    "array of integers": {"type": "array", "items": {"type": "integer"}},
    "array of strings": {"type": "array", "items": {"type": "string"}},
    "array of a length": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "boolean"}, {"type": "null"}],
        "additionalItems": False,
        "minItems": 1,
    },
    "empty object": record(),
    "flags": record(a={"type": "boolean"}, l={"type": "array", "items": {"type": "boolean"}}),
    "person": _PERSON,
    "nested": record(
        person={"$ref": "#/$defs/Person"},
        tags={"type": "array", "items": {"enum": ["x", "y", "z"]}, "maxItems": 3},
    )
    | {"$defs": {"Person": _PERSON}},
    "all optional": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "some of two": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 9}},
        "minProperties": 1,
        "maxProperties": 1,
    },
    "some and others": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "map of strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "map of zod": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "number"},
    },
    "map of named keys": {
        "type": "object",
        "propertyNames": {"enum": ["north", "south"]},
        "additionalProperties": {"type": "integer"},
    },
    "named and free keys": {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "pattern of keys": {
        "type": "object",
        "patternProperties": {"^x-[a-z]+$": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "union": {"anyOf": [{"type": "integer"}, {"type": "string"}, record(error={"type": "string"})]},
    "tagged union": {
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": _KINDS,
    },
    "intersection": {
        "allOf": [
            record(a={"type": "integer"}) | {"additionalProperties": True},
            {"properties": {"b": {"type": "null"}}},
        ]
    },
    "choice beside properties": {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "required": ["id"],
        "anyOf": [
            {"properties": {"ok": {"const": True}}, "required": ["ok"]},
            {"properties": {"why": {"type": "string", "maxLength": 9}}, "required": ["why"]},
        ],
    },
    "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    "linked list": {"$ref": "#/definitions/node", "definitions": {"node": _NODE}},
    "refers to itself": {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "leaf": {"type": "boolean"}},
        "required": ["leaf"],
    },
}
