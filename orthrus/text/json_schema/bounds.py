"""Prepare JSON Schemas for llguidance: keywords that it can't enforce are refused by name, and open ends get bounds.

A schema allows answers that never end: a number with ever more digits, a list with ever more items, an ever deeper tree.
So every number, string, array and object gets bounds where the schema has none, and recursion gets a depth. Every value that
the bounded schema accepts is also valid under the given one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orthrus.errors import RequestError
from orthrus.text.json_schema.algebra import exclusive, merged, types_of
from orthrus.text.json_schema.keywords import (
    Schema,
    SchemaError,
    is_schema,
    literal,
    other_keys_pattern,
)
from orthrus.text.json_schema.leaves import constant, number, string
from orthrus.text.json_schema.references import References

MAX_KEY = 64
"""Characters of a key that has no name in the schema."""
MAX_ITEMS = 50
"""Items of an array without maxItems, beyond its minItems. Halved for each open-ended array or object around it."""
MAX_KEYS = 24
"""Keys without a name in the schema, of an object without maxProperties. Halved likewise."""
MAX_DEPTH = 6
"""How deep recursive references may nest, and arrays and objects where the schema allows any value."""

# Beyond these limits llguidance takes about a second, or hits its own limits in the middle of an answer.
_MAX_SCHEMAS = 20_000
_MAX_OPTIONS = 64
_MAX_OPTIONAL = 200
_MAX_PATTERNS = 300
_FREE = "free"
"""The target of a reference to any value. No JSON Pointer looks like this."""


def bounded(schema: Any, param: str) -> Schema:
    """A schema for llguidance. It accepts only values that `schema` accepts, and only texts that end.

    param: the request's field, for errors. Raises RequestError that names the keyword and its place if `schema` is not a valid
    schema, has a reference without a target, accepts no value, or asks for what can't be enforced token by token.
    """
    try:
        if not is_schema(schema):
            raise SchemaError("a JSON Schema is an object, true or false")
        _check_values(schema)
        result = _Bounding(schema).result()
        if result is False:
            raise SchemaError("the schema accepts no value")
    except RecursionError:
        raise RequestError(f"{param}: the schema is nested too deeply", param) from None
    except SchemaError as error:
        raise RequestError(f"{param}: {error}", param) from None
    return result


def _check_values(schema: Any) -> None:
    """Raise SchemaError unless all numbers are finite and all texts are Unicode, in constants too."""
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SchemaError("a text has half of a surrogate pair, which is no character") from None
    except ValueError:
        raise SchemaError("a number is too large, or none") from None


class _Bounding:
    """Rewrites a schema. A recursive part is rewritten once for each depth at which it may stand (`_Room.level`)."""

    def __init__(self, schema: Schema | bool) -> None:
        self._references = References(schema)
        self._root = schema
        self._schemas = self._patterns = 0
        self._names: dict[tuple[str, _Room], str] = {}
        self._bodies: list[tuple[str, _Room]] = []
        self._heights: dict[str, float] = {}

    def result(self) -> Any:
        self._find_heights()
        height = self._height(self._root)
        if height > MAX_DEPTH:
            return False
        root = self._bound(self._root, _Room(MAX_DEPTH + int(height)))
        definitions: Schema = {}
        while self._bodies:
            target, room = self._bodies.pop()
            free = target == _FREE
            body = self._leaf({}, room) if free else self._bound(self._references[target], room)
            definitions[self._names[target, room]] = body
        return root if root is False else {**root, "$defs": definitions}

    # --- the least depth of recursion that any value of a schema needs

    def _find_heights(self) -> None:
        """For each recursive target: the fewest nested recursive references that a value of it can have."""
        recursive = self._references.recursive
        self._heights = dict.fromkeys(recursive, math.inf)
        for _ in range(MAX_DEPTH + 1):
            found = {target: self._height(self._references[target]) for target in recursive}
            if found == {target: self._heights[target] for target in recursive}:
                return
            self._heights = found

    def _height(self, raw: Schema | bool) -> float:
        if isinstance(raw, bool):
            return 0 if raw else math.inf
        schema = self._clean(raw)
        if schema.keys() == {"$ref"}:
            return self._target_height(self._references.target(schema["$ref"]))
        try:
            flat, hops = self._flat(schema)
        except _Nothing:
            return math.inf
        if "anyOf" in flat or "oneOf" in flat:
            return hops + min(map(self._height, self._options(flat)), default=math.inf)
        if "enum" in flat or "const" in flat:
            return hops
        return hops + min(self._type_height(flat, name) for name in types_of(flat))

    def _target_height(self, target: str) -> float:
        if target not in self._heights:
            self._heights[target] = self._height(self._references[target])
        return self._heights[target] + (target in self._references.recursive)

    def _type_height(self, schema: Schema, name: str) -> float:
        needed: list[Schema | bool] = []
        if name == "object":
            rest = schema.get("additionalProperties", True)
            needed = [schema.get("properties", {}).get(key, rest) for key in schema.get("required", ())]
        elif name == "array":
            prefix, least = schema.get("prefixItems", []), schema.get("minItems", 0)
            needed = prefix[:least] + [schema.get("items", True)] * (least > len(prefix))
        return max(map(self._height, needed), default=0)

    # --- one schema without references and combinations

    def _clean(self, raw: Schema) -> Schema:
        self._schemas += 1
        if self._schemas > _MAX_SCHEMAS:
            raise SchemaError("the schema is too large, or refers to itself in too many ways")
        return self._references.clean(raw)

    def _flat(self, schema: Schema) -> tuple[Schema, int]:
        """A cleaned schema with its `$ref` and `allOf` merged in, and how many recursive references were followed.

        Raises _Nothing if it accepts no value.
        """
        flat: Schema = {name: value for name, value in schema.items() if name not in ("$ref", "allOf")}
        hops = 0
        parts: list[Any] = list(schema.get("allOf", ()))
        if "$ref" in schema:
            target = self._references.target(schema["$ref"])
            hops += target in self._references.recursive
            parts.append(self._references[target])
        for part in parts:
            if part is False:
                raise _Nothing("false")
            if part is not True:
                below, more = self._flat(self._clean(part))
                flat, hops = merged(flat, below), hops + more
        return flat, hops

    def _options(self, schema: Schema) -> Iterator[Schema | bool]:
        """The options of a flat schema's `anyOf` or `oneOf`, each combined with the schema's other keywords."""
        name = "anyOf" if "anyOf" in schema else "oneOf"
        rest = {key: value for key, value in schema.items() if key != name}
        for option in schema[name]:
            yield option if not rest else {"allOf": [rest, option]}

    # --- bounds

    def _bound(self, raw: Schema | bool, room: "_Room") -> Any:
        """`raw` within the limits of `room`: a schema for llguidance, or False if no value fits."""
        if raw is False:
            return False
        schema = {} if raw is True else self._clean(raw)
        if not schema:
            return self._definition(_FREE, room)
        if self._height(raw) > room.level:
            return False
        if schema.keys() == {"$ref"}:
            target = self._references.target(schema["$ref"])
            return self._definition(target, room.below(target in self._references.recursive))
        flat, hops = self._flat(schema)
        if not flat:
            return self._definition(_FREE, room)
        if "anyOf" in flat or "oneOf" in flat:
            return self._union(flat, room.below(hops))
        return self._leaf(flat, room.below(hops))

    def _definition(self, target: str, room: "_Room") -> Schema:
        if (target, room) not in self._names:
            self._names[target, room] = str(len(self._names))
            self._bodies.append((target, room))
        return {"$ref": f"#/$defs/{self._names[target, room]}"}

    def _union(self, schema: Schema, room: "_Room") -> Any:
        if "anyOf" not in schema:
            self._check_exclusive(schema)
        options = [self._bound(option, room) for option in self._options(schema)]
        left = [option for option in options if option is not False]
        return {"anyOf": left} if left else False

    def _check_exclusive(self, schema: Schema) -> None:
        """Raise SchemaError unless the options of `oneOf` exclude each other: it is written as `anyOf`."""
        options = [self._flat_of(option) for option in self._options(schema)]
        if len(options) > _MAX_OPTIONS:
            raise SchemaError(f"oneOf may have {_MAX_OPTIONS} options at most: use anyOf")
        for i, one in enumerate(options):
            for j, other in enumerate(options):
                if i != j and not exclusive(one, other, self._flat_of):
                    raise SchemaError(
                        f"oneOf: a value can be valid under options {min(i, j)} and {max(i, j)} at once, which can't be "
                        "ruled out while an answer is written: use anyOf, or give each option a required property with "
                        "a const of its own"
                    )

    def _flat_of(self, raw: Schema | bool) -> Schema | bool:
        if isinstance(raw, bool):
            return raw
        try:
            return self._flat(self._clean(raw))[0] or True
        except _Nothing:
            return False

    def _leaf(self, schema: Schema, room: "_Room") -> Any:
        """The bounded form of a schema without combinations, for each of its types."""
        if "enum" in schema or "const" in schema:
            return constant(schema)
        types = types_of(schema)
        if not schema and room.free == 0:
            types -= {"array", "object"}
        out: Schema = {"type": sorted(types)}
        if types & {"integer", "number"}:
            out |= number(schema, whole="number" not in types)
        if "string" in types:
            self._patterns += "pattern" in schema
            if self._patterns > _MAX_PATTERNS:
                raise SchemaError(f"more than {_MAX_PATTERNS} strings with a pattern")
            out |= string(schema)
        if "array" in types:
            out |= self._array(schema, room)
        if "object" in types:
            out |= self._object(schema, room)
        return out

    def _array(self, schema: Schema, room: "_Room") -> Schema:
        prefix = schema.get("prefixItems", [])
        least = schema.get("minItems", 0)
        # A schema with prefixItems but no items is taken to list all items, as properties list all keys.
        items = schema.get("items", not prefix or least > len(prefix))
        most = schema.get("maxItems", max(least, len(prefix)) + room.items)
        inside = room.inside(schema, bounded="maxItems" in schema)
        found: Schema = {"items": self._bound(items, inside), "minItems": least, "maxItems": most}
        if prefix:
            found["prefixItems"] = [self._bound(item, room.inside(schema, bounded=True)) for item in prefix]
        return found

    def _object(self, schema: Schema, room: "_Room") -> Schema:
        given, patterns = schema.get("properties", {}), dict(schema.get("patternProperties", {}))
        required = list(dict.fromkeys(schema.get("required", ())))
        # A schema that names properties wants those. Others are never needed.
        rest = schema.get("additionalProperties", not given and not patterns)
        wanted = {**given, **{key: rest for key in required if key not in given and not patterns}}
        named = {key: self._bound(sub, room.inside(schema, bounded=True)) for key, sub in wanted.items()}
        inside = room.inside(schema, bounded="maxProperties" in schema)
        other = self._bound(rest, inside)
        free = {pattern: self._bound(sub, inside) for pattern, sub in patterns.items()}
        if other is not False and not patterns:
            free[other_keys_pattern(wanted, MAX_KEY)] = other
        if len(wanted) - len(required) > _MAX_OPTIONAL:
            raise SchemaError(
                f"an object may have {_MAX_OPTIONAL} optional properties at most: require the others"
            )
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        bound = len(named) + (max(room.keys, least) if free else 0)
        found: Schema = {"required": required, "additionalProperties": other if patterns else False}
        if free or least > len(required) or (most is not None and most < len(named)):
            # llguidance counts only required keys and patterns. So each optional key is written as a pattern of its own.
            free |= {f"^{literal(key)}$": named.pop(key) for key in wanted if key not in required}
            found |= {"minProperties": least, "maxProperties": bound if most is None else min(most, bound)}
        return found | {"properties": named, "patternProperties": free}


@dataclass(frozen=True, slots=True)
class _Room:
    """The limits on a value at one place of the schema."""

    # Recursive references that may still nest in it.
    level: int
    # Arrays and objects that may still nest in it where the schema allows any value.
    free: int = MAX_DEPTH
    # Arrays and objects around it for which the schema gives no largest size.
    outside: int = 0

    @property
    def items(self) -> int:
        return max(MAX_ITEMS >> self.outside, 2)

    @property
    def keys(self) -> int:
        return max(MAX_KEYS >> self.outside, 2)

    def below(self, hops: int) -> "_Room":
        return replace(self, level=self.level - hops)

    def inside(self, schema: Schema, *, bounded: bool) -> "_Room":
        """The limits on what is in an array or object. schema: of that array or object, empty if it allows any value.

        bounded: whether the schema gives its largest size.
        """
        free = MAX_DEPTH if schema else self.free - 1
        return replace(self, free=free, outside=self.outside + (not bounded and self.items > 2))


class _Nothing(Exception):
    """The schema accepts no value."""
