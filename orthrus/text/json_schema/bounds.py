"""JSON Schemas made ready for llguidance: what it can't enforce is refused by name, and what has no bound gets one.

A schema says what an answer may be, not that it ends: a number may have digits for ever, a list items, a tree children.
So every number, string, array and object gets bounds where the schema has none, and recursive references a depth. Whatever
the bounded schema accepts, the given one accepts.
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
MAX_KEYS = 24
"""Items of an array without maxItems, beyond its minItems, and keys that have no name in the schema, of an object without
maxProperties. Within another such array or object half as many, and so on."""
MAX_DEPTH = 6
"""Recursive references within one another; arrays and objects within one another where the schema leaves values free."""

# What takes llguidance a second or so, or is beyond its own limits in the middle of an answer.
_MAX_SCHEMAS = 20_000
_MAX_OPTIONS = 64
_MAX_OPTIONAL = 200
_MAX_PATTERNS = 300
_FREE = "free"
"""Stands for the target of a reference to any value; JSON Pointers begin otherwise."""


def bounded(schema: Any, param: str) -> Schema:
    """A schema for llguidance that accepts some of what `schema` does, and only texts that end.

    param: the request's field, for errors. Raises RequestError naming the keyword and its place for a schema that is none,
    refers to what is not there, accepts nothing, or asks for what can't be enforced token by token.
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
    """Numbers must be finite and texts Unicode, in constants too. Raises SchemaError."""
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SchemaError("a text has half of a surrogate pair, which is no character") from None
    except ValueError:
        raise SchemaError("a number is too large, or none") from None


class _Bounding:
    """Walks over a schema once for each depth of recursion that is left. `level`: recursive references that may follow."""

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

    # --- how deep a value must be, so that its recursion can be cut

    def _find_heights(self) -> None:
        """How many recursive references any value must at least have within one another, for each recursive target."""
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
        """A cleaned schema with `$ref` and `allOf` worked in, and how many recursive references that took.

        Raises _Nothing if no value is left.
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
        """What a flat schema leaves to choose from by `anyOf` or `oneOf`, each with the schema's other keywords."""
        name = "anyOf" if "anyOf" in schema else "oneOf"
        rest = {key: value for key, value in schema.items() if key != name}
        for option in schema[name]:
            yield option if not rest else {"allOf": [rest, option]}

    # --- bounds

    def _bound(self, raw: Schema | bool, room: "_Room") -> Any:
        """What `raw` is within `room`: a schema for llguidance, or False if no value has room."""
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
        """`oneOf` is written as `anyOf`, so no value that is written for one option may be valid under another."""
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
        """A schema without combinations, with bounds for each of its types."""
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
        # A list of prefix items alone names all that there are, as properties do.
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
        # Whoever names properties wants those; valid answers have no need of others.
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
            # llguidance counts keys only where those with a name are required; others are patterns of one key each.
            free |= {f"^{literal(key)}$": named.pop(key) for key in wanted if key not in required}
            found |= {"minProperties": least, "maxProperties": bound if most is None else min(most, bound)}
        return found | {"properties": named, "patternProperties": free}


@dataclass(frozen=True, slots=True)
class _Room:
    """What a value may hold. level: recursive references within one another; free: arrays and objects within one another
    where no schema says what they are; outside: arrays and objects around it whose numbers of items the schema leaves open."""

    level: int
    free: int = MAX_DEPTH
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
        """Of what is in an array or object of `schema`, which is empty where none says what it is.

        bounded: whether the schema says how many there are.
        """
        free = MAX_DEPTH if schema else self.free - 1
        return replace(self, free=free, outside=self.outside + (not bounded and self.items > 2))


class _Nothing(Exception):
    """No value is left."""
