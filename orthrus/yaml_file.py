"""Reads YAML that people write. A value that YAML readers understand differently is an error, with its place in the file.

PyYAML reads YAML 1.1, in which 0755 is 493, 1:30 is 90 and a key that comes twice silently counts once.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orthrus.errors import ConfigError

Keys = tuple[Hashable, ...]
"""Keys and indices from the top of a document to a value."""

_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_YAML_1_1_WORDS = re.compile(r"(?i)yes|no|on|off")


@dataclass(frozen=True)
class YamlFile:
    """A document, and where in its text the values are."""

    name: str
    data: Any = None
    """None if the document is empty."""
    marks: dict[Keys, tuple[int, int]] = field(default_factory=dict)
    """Line and column, from 1, of the key or item at each path."""
    plain: dict[Keys, str] = field(default_factory=dict)
    """The text of each value without quotes, as it is spelled in the file."""

    def place(self, path: Keys) -> str:
        """ "FILE:LINE:COLUMN" of the value at `path`, or of the nearest value around it if there is none."""
        while path not in self.marks and path:
            path = path[:-1]
        return ":".join(map(str, (self.name, *self.marks.get(path, (1, 1)))))

    def below(self, key: str) -> "YamlFile":
        """A document in which this one is the value of `key`, with the same places in the file."""
        marks = {(key, *path): mark for path, mark in self.marks.items()}
        plain = {(key, *path): text for path, text in self.plain.items()}
        return YamlFile(self.name, {key: self.data}, marks, plain)


def read_yaml(path: Path) -> YamlFile:
    """The document in a file. Raises ConfigError as `parse_yaml` does, and if the file can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> YamlFile:
    """The document in `text`. Raises ConfigError with a line for each fault: `name`, line, column and the fix."""
    try:
        # PyYAML's own SafeLoader, taken in two steps, since positions are known only in between.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return YamlFile(name)
        reader = _Reader(loader, YamlFile(name))
        reader.walk(root, ())
        if reader.faults:
            raise ConfigError("\n".join(reader.faults))
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: not YAML: {' '.join(said.split())}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deep") from error
    return YamlFile(name, data, reader.file.marks, reader.file.plain)


class _Reader:
    """Checks each node of a document once, however many aliases it has."""

    def __init__(self, loader: yaml.SafeLoader, file: YamlFile) -> None:
        self.file = file
        self.faults: list[str] = []
        self._loader = loader
        self._seen: set[int] = set()
        self._above: set[int] = set()

    def walk(self, node: yaml.Node, path: Keys) -> None:
        self._mark(node, path)
        if id(node) in self._above:
            self._fault(node, path, "an alias refers to a value that contains it: remove it")
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        self._above.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            self._walk_mapping(node, path)
        self._above.remove(id(node))

    def _walk_mapping(self, node: yaml.MappingNode, path: Keys) -> None:
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.walk(value_node, path)
                continue
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                given = key if isinstance(key, str) else "this"
                self._fault(
                    key_node,
                    path,
                    f"YAML 1.1 does not read {given} as text, and a key is text: put it in quotes",
                )
                continue
            if key in lines:
                said = f"comes twice, first in line {lines[key]}: remove one"
                self._fault(key_node, (*path, key), said)
                continue
            lines[key] = key_node.start_mark.line + 1
            self.walk(value_node, (*path, key))
            # The place of a value is that of its key, because an empty value has none.
            self._mark(key_node, (*path, key), again=True)

    def _check_scalar(self, node: yaml.ScalarNode, path: Keys) -> None:
        if node.style is not None:
            return
        text, kind = node.value, node.tag.rpartition(":")[2]
        self.file.plain.setdefault(path, text)
        try:
            value = self._loader.construct_object(node)
        except ValueError as error:
            self._fault(node, path, f"{text} is no {kind}: {error}")
            return
        if kind in ("int", "float") and ":" in text:
            said = f"YAML 1.1 reads {text} as {value}, counting in sixties: write the number, or '{text}' in quotes"
            self._fault(node, path, said)
        elif kind == "int" and _OCTAL.fullmatch(text):
            said = f"YAML 1.1 reads {text} as octal, which is {value}: leave out the leading 0, or quote it"
            self._fault(node, path, said)

    def _mark(self, node: yaml.Node, path: Keys, again: bool = False) -> None:
        if again or path not in self.file.marks:
            self.file.marks[path] = (node.start_mark.line + 1, node.start_mark.column + 1)

    def _fault(self, node: yaml.Node, path: Keys, said: str) -> None:
        place = f"{self.file.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.faults.append(f"{place}: {spell_path(path)}{': ' if path else ''}{said}")


def spell_path(path: Keys) -> str:
    """ "applications[0].args"."""
    said = ""
    for part in path:
        said += f"[{part}]" if isinstance(part, int) else f".{part}" if said else str(part)
    return said


def reading(plain: str) -> str:
    """What to do about a value without quotes that should have been a text."""
    if _YAML_1_1_WORDS.fullmatch(plain):
        return f"YAML 1.1 reads {plain} without quotes as true or false: put it in quotes"
    return f"put {plain} in quotes" if plain else "it is empty"
