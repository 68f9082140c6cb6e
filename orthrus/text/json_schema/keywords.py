"""Check the keywords of one JSON Schema object, and rewrite those of older drafts."""

from collections.abc import Callable, Iterable
from typing import Any

Schema = dict[str, Any]

TYPES = ("null", "boolean", "number", "string", "array", "object")
_NAMES = (*TYPES, "integer")

FORMATS = {
    # The formats that llguidance knows, and the most characters that each needs.
    **dict.fromkeys(("date-time", "date", "time", "duration"), 40),
    **dict.fromkeys(("ipv4", "ipv6", "uuid"), 45),
    **dict.fromkeys(("email", "hostname"), 254),
    "uri": 1024,
}
NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
TEXTUAL = ("minLength", "maxLength", "pattern", "format")
SCALAR = ("type", *NUMERIC, *TEXTUAL)
_OF_ARRAYS = ("minItems", "maxItems", "prefixItems", "items")
_OF_OBJECTS = (
    *("properties", "patternProperties", "additionalProperties"),
    *("required", "minProperties", "maxProperties"),
)
STRUCTURAL = {*_OF_ARRAYS, *_OF_OBJECTS}
_KEPT = (
    *("$ref", "allOf", "anyOf", "oneOf", "type", "enum", "const"),
    *(*TEXTUAL, *NUMERIC, *_OF_ARRAYS, *_OF_OBJECTS),
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf"}
# They depend on the whole value, or on other parts of it, so they can't be checked token by token.
_NOT_ENFORCED = (
    *("not", "if", "contains", "uniqueItems", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef"),
)


class SchemaError(ValueError):
    """What is wrong with one schema object. `bounded` adds where it stands."""


def is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def clean(schema: Schema, *, ref_stands_alone: bool) -> Schema:
    """The keywords of `schema` that constrain values. The others are annotations, and so are unknown formats.

    ref_stands_alone: whether `$ref` hides the keywords beside it, as it did up to draft 7. Raises SchemaError for a keyword
    with an invalid value, and for one that can't be enforced while an answer is written.
    """
    for name, value in schema.items():
        if name in _FORMS:
            is_right, form = _FORMS[name]
            if not is_right(value):
                raise SchemaError(f"{name} must be {form}")
    if "x-guidance" in schema:
        raise SchemaError("x-guidance, llguidance's options, can't be set here: remove it")
    if ref_stands_alone and "$ref" in schema:
        return {"$ref": schema["$ref"]}
    kept = {name: schema[name] for name in _KEPT if name in schema}
    _update_draft(schema, kept)
    done = _write_otherwise(schema, kept)
    for name in _NOT_ENFORCED:
        if name in schema and name not in done:
            raise SchemaError(
                f"{name} can't be enforced while an answer is written: leave it out, and check it on your side"
            )
    return kept


def _update_draft(schema: Schema, kept: Schema) -> None:
    if isinstance(kept.get("items"), list):
        kept["prefixItems"] = kept.pop("items")
        if "additionalItems" in schema:
            kept["items"] = schema["additionalItems"]
    for inclusive, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(kept.get(exclusive), bool) and kept.pop(exclusive) and inclusive in kept:
            kept[exclusive] = kept.pop(inclusive)
    if kept.get("format") not in FORMATS:
        kept.pop("format", None)
    for name in _COUNTS:
        if name in kept:
            kept[name] = int(kept[name])


def _write_otherwise(schema: Schema, kept: Schema) -> set[str]:
    """Rewrite keywords that llguidance lacks by those that it has. Returns the names of those that this covers."""
    done = set()
    if schema.get("uniqueItems") is False or kept.get("maxItems", 2) < 2:
        done.add("uniqueItems")
    done |= {
        name for name in ("dependentRequired", "dependentSchemas", "dependencies") if schema.get(name) == {}
    }
    for name, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in schema and (schema[name] in (True, {}) or not _COMBINING & schema.keys()):
            kept.setdefault(plain, schema[name])
            done.add(name)
    if "propertyNames" in schema and _name_keys(schema["propertyNames"], kept):
        done.add("propertyNames")
    return done


def _name_keys(names: Any, kept: Schema) -> bool:
    """Rewrite `propertyNames` by the keywords for properties. Returns False if that is not possible."""
    rules = {} if names is True else {k: v for k, v in names.items() if k in _KEPT} if names else {"not": {}}
    if rules.pop("type", "string") != "string":
        return False
    if not rules:
        return True
    if {"properties", "patternProperties"} & kept.keys():
        return False
    values = kept.get("additionalProperties", True)
    if rules.keys() <= {"enum", "const"}:
        keys = rules.get("enum", [rules.get("const")])
        kept["properties"] = {key: values for key in keys if isinstance(key, str)}
    elif rules.keys() == {"pattern"}:
        kept["patternProperties"] = {rules["pattern"]: values}
    elif rules.keys() <= {"minLength", "maxLength"}:
        kept["patternProperties"] = {key_pattern(rules.get("minLength", 0), rules.get("maxLength")): values}
    else:
        return False
    kept["additionalProperties"] = False
    return True


def key_pattern(least: int, most: int | None) -> str:
    """A regular expression for keys of `least` to `most` characters, without control characters."""
    return f"^{_PLAIN}{{{least},{'' if most is None else most}}}$"


def other_keys_pattern(names: Iterable[str], most: int) -> str:
    """A regular expression for keys of 1 to about `most` characters that are not among `names`."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for character in name:
            node = node.setdefault(character, {})
        node[""] = {}
    return f"^{_outside(tree, most, first=True)}$"


def literal(text: str) -> str:
    """A regular expression for just this text."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)


_PLAIN = r"[^\x00-\x1f\x7f]"


def _outside(tree: dict[str, Any], most: int, *, first: bool = False) -> str:
    """A pattern for all texts but the names in `tree`, a trie of characters in which "" marks the end of a name."""
    characters = [character for character in tree if character]
    taken = literal("".join(characters))
    ways = [rf"[^\x00-\x1f\x7f{taken}]{_PLAIN}{{0,{most - 1}}}"]
    ways += [f"{literal(character)}{_outside(tree[character], most)}" for character in characters]
    if not first and "" not in tree:
        ways.append("")
    return f"(?:{'|'.join(ways)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1 << 31 and value == int(value)


def _is_list_of_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_schema, value))


def _is_items(value: Any) -> bool:
    return is_schema(value) or (isinstance(value, list) and all(map(is_schema, value)))


def _is_object_of_schemas(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_schema, value.values()))


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in _NAMES for name in names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"one of {', '.join(_NAMES)}, or a list of them"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of one value or more"),
    "pattern": (_is_text, "a regular expression"),
    "format": (_is_text, "a name"),
    "$ref": (_is_text, "a reference"),
    "required": (_is_texts, "a list of names"),
    "items": (_is_items, "a schema"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("minimum", "maximum"), (_is_number, "a number")),
    # Draft 4 has booleans here.
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"), (lambda v: _is_number(v) or v in (True, False), "a number")
    ),
    **dict.fromkeys(_COUNTS, (_is_count, "a whole number from 0 to 2147483647")),
    **dict.fromkeys(("additionalProperties", "additionalItems", "propertyNames"), (is_schema, "a schema")),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (_is_list_of_schemas, "a list of one schema or more")),
    "prefixItems": (_is_items, "a list of schemas"),
    **dict.fromkeys(("properties", "patternProperties"), (_is_object_of_schemas, "an object of schemas")),
}
