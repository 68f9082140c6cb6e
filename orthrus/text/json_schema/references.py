"""Resolve the `$ref`s of a JSON Schema, and find those that are recursive."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from orthrus.text.json_schema.keywords import Schema, SchemaError, clean, is_schema

_MAX_VISITS = 50_000


class References:
    """The schemas that `root` refers to, by their JSON Pointer in it.

    Raises SchemaError for a reference without a target, and for a mistake in any schema that is referred to.
    """

    def __init__(self, root: Schema | bool) -> None:
        self._root = root
        self._cleaned: dict[int, tuple[Schema, Schema]] = {}
        self._old = isinstance(root, dict) and bool(re.search(r"draft-0[3-7]", str(root.get("$schema", ""))))
        self._base = str(root.get("$id", root.get("id", ""))) if isinstance(root, dict) else ""
        self._anchors: dict[str, str] = dict(_anchors(root))
        self._targets: dict[str, Schema | bool] = {}
        # The pointers of schemas that refer back to themselves, or that lie between two such schemas.
        self.recursive = _in_cycles(self._edges())

    def __getitem__(self, target: str) -> Schema | bool:
        return self._targets[target]

    def clean(self, schema: Schema) -> Schema:
        """The schema after `keywords.clean`, which runs once for each schema."""
        found = self._cleaned.get(id(schema))
        if found is None:
            # Keeps the schema alive: another object could get its id.
            found = self._cleaned[id(schema)] = schema, clean(schema, ref_stands_alone=self._old)
        return found[1]

    def target(self, reference: str) -> str:
        """The pointer that a `$ref` stands for."""
        base, _, fragment = reference.partition("#")
        if base and base != self._base.partition("#")[0]:
            raise SchemaError(
                f"$ref {reference!r} leads out of the schema: put what it refers to under $defs"
            )
        pointer = unquote(fragment)
        if pointer and not pointer.startswith("/"):
            if pointer not in self._anchors:
                raise SchemaError(f"$ref {reference!r}: there is no such $anchor")
            pointer = self._anchors[pointer]
        if pointer not in self._targets:
            self._targets[pointer] = self._resolve(pointer, reference)
        return pointer

    def _resolve(self, pointer: str, reference: str) -> Schema | bool:
        value: Any = self._root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and key.isdecimal() and len(key) < 10 and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise SchemaError(f"$ref {reference!r} leads nowhere")
        if not is_schema(value):
            raise SchemaError(f"$ref {reference!r} leads to what is no schema")
        found: Schema | bool = value
        return found

    def _edges(self) -> dict[str, set[str]]:
        """For the root and for each pointer that it reaches: the pointers that its schema refers to."""
        edges: dict[str, set[str]] = {}
        waiting, visits = [""], 0
        self._targets[""] = self._root
        while waiting:
            target = waiting.pop()
            if target in edges:
                continue
            edges[target] = set()
            inner: list[tuple[Any, str]] = [(self._targets[target], f"#{target}")]
            while inner:
                schema, place = inner.pop()
                if isinstance(schema, bool):
                    continue
                visits += 1
                if visits > _MAX_VISITS:
                    raise SchemaError("the schema is too large")
                try:
                    cleaned = self.clean(schema)
                    if "$ref" in cleaned:
                        edges[target].add(self.target(cleaned["$ref"]))
                except SchemaError as error:
                    raise SchemaError(f"{place}: {error}") from None
                inner += ((sub, f"{place}/{name}") for name, sub in subschemas(cleaned))
            waiting += edges[target]
        return edges


def subschemas(schema: Schema) -> Iterator[tuple[str, Schema | bool]]:
    """The schemas directly inside a cleaned one, each with its place. References are not followed."""
    for name in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for i, sub in enumerate(schema.get(name, ())):
            yield f"{name}/{i}", sub
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield name, schema[name]
    for name in ("properties", "patternProperties"):
        for key, sub in schema.get(name, {}).items():
            yield f"{name}/{key}", sub


def _anchors(root: Any) -> Iterator[tuple[str, str]]:
    """All names that `$anchor`s give, and `$id`s that are only a fragment, each with the pointer to its schema."""
    waiting = [(root, "")]
    while waiting:
        value, pointer = waiting.pop()
        if isinstance(value, list):
            waiting += ((item, f"{pointer}/{i}") for i, item in enumerate(value))
        elif isinstance(value, dict):
            if isinstance(name := value.get("$anchor"), str):
                yield name, pointer
            if isinstance(name := value.get("$id"), str) and name.startswith("#"):
                yield name[1:], pointer
            waiting += (
                (item, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
                for key, item in value.items()
            )


def _in_cycles(edges: dict[str, set[str]]) -> set[str]:
    """The nodes of cycles, and those on a path between two cycles. All others are removed, from both ends of each path."""
    left = {node: set(targets) for node, targets in edges.items()}
    for _ in range(2):
        sources: dict[str, list[str]] = {node: [] for node in left}
        for node, targets in left.items():
            for target in targets:
                sources[target].append(node)
        ends = [node for node, targets in left.items() if not targets]
        while ends:
            end = ends.pop()
            del left[end]
            for node in sources[end]:
                left[node].discard(end)
                if not left[node]:
                    ends.append(node)
        # Once more with all edges reversed.
        turned: dict[str, set[str]] = {node: set() for node in left}
        for node, targets in left.items():
            for target in targets:
                turned[target].add(node)
        left = turned
    return set(left)
