"""JSON objects in a model's text: streams one to its end without keys that come twice, and reads the members of a whole one."""

import json
import re
from typing import Any

_BLANKS = " \t\n\r"
_SIGN = re.compile(r"[ \t\n\r]*([\[\]{}:,])[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_decoder = json.JSONDecoder(strict=False)


class ObjectText:
    """Passes one JSON object or array on as it comes.

    If a key comes twice in an object, only the first is passed on, since JSON parsers disagree about such objects. Control
    characters in strings, which JSON forbids but models write, are escaped. Other faults are passed on as they are.
    """

    def __init__(self) -> None:
        # Whether it has ended: after the closing bracket, or at a `<`, which JSON has in strings only.
        self.over = False
        self.complete = False
        # The keys of each object that is open, None for an array.
        self._open: list[set[str] | None] = []
        self._in_string = False
        self._escaped = False
        # A comma and the key after it wait here until the key is known to be new.
        self._waiting = ""
        self._key_next = False
        self._key: str | None = None
        # How many brackets are open around the value that is being left out, 0 if none is.
        self._left_out = 0

    def push(self, text: str) -> tuple[str, int]:
        """Add a piece of text. Returns what to pass on, and how many characters of the piece belong to the object."""
        out: list[str] = []
        position = 0
        while position < len(text) and not self.over:
            character = text[position]
            if self._in_string and not self._escaped and (plain := _PLAIN.match(text, position)):
                self._emit(plain[0], out)
                position = plain.end()
                continue
            if self._in_string:
                self._add_to_string(character, out)
            elif character == "<":
                self.over = True
                out.append(self.rest())
                break
            else:
                self._add(character, out)
            position += 1
        return "".join(out), position

    def rest(self) -> str:
        """What still waits. For a text that ends before the object does."""
        waiting, self._waiting = self._waiting, ""
        return waiting

    def _add(self, character: str, out: list[str]) -> None:
        """A character outside of strings."""
        if self._left_out == len(self._open) and character in ",}]":
            self._left_out = 0
        if self._key_next and character not in _BLANKS:
            self._key_next = False
            if character == '"':
                self._key = ""
            else:
                out.append(self.rest())
        match character:
            case '"':
                self._in_string = True
            case "," if self._open and self._open[-1] is not None and not self._left_out:
                self._key_next = True
                self._waiting = character
                return
            case "{" | "[":
                self._open.append(set() if character == "{" else None)
                self._key_next = character == "{" and not self._left_out
            case "}" | "]" if self._open:
                self._open.pop()
                self.over = self.complete = not self._open
        self._emit(character, out)

    def _add_to_string(self, character: str, out: list[str]) -> None:
        self._emit(json.dumps(character)[1:-1] if character < " " else character, out)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._key is not None:
                self._end_key(out)

    def _emit(self, text: str, out: list[str]) -> None:
        if self._key is not None:
            self._key += text
        if self._waiting:
            self._waiting += text
        elif not self._left_out:
            out.append(text)

    def _end_key(self, out: list[str]) -> None:
        keys = self._open[-1]
        assert keys is not None and self._key is not None
        try:
            key = json.loads(self._key)
        except ValueError:  # An escape that JSON doesn't have.
            key = self._key
        self._key = None
        if key in keys:
            self._left_out, self._waiting = len(self._open), ""
        else:
            keys.add(key)
            out.append(self.rest())


def members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object: each key's value, and the text that it was read from. The first of equal keys counts.

    Raises ValueError and RecursionError if `text` is no such object.
    """
    found: dict[str, tuple[Any, str]] = {}
    sign, position = _sign(text, 0, "{")
    while sign != "}":
        if text[position : position + 1] == "}" and not found:
            break
        if text[position : position + 1] != '"':
            raise ValueError("a key must be a string")
        key, position = _decoder.raw_decode(text, position)
        _, start = _sign(text, position, ":")
        value, end = _decoder.raw_decode(text, start)
        found.setdefault(key, (value, text[start:end]))
        sign, position = _sign(text, end, ",}")
    return found


def elements(text: str) -> list[str]:
    """The texts of an array's elements. Raises ValueError and RecursionError if `text` is no array of one or more."""
    found: list[str] = []
    sign, start = _sign(text, 0, "[")
    while sign != "]":
        _, end = _decoder.raw_decode(text, start)
        found.append(text[start:end])
        sign, start = _sign(text, end, ",]")
    return found


def _sign(text: str, position: int, expected: str) -> tuple[str, int]:
    """The sign at `position`, and the position after it, blanks skipped. Raises ValueError for a sign that is not `expected`."""
    match = _SIGN.match(text, position)
    if match is None or match[1] not in expected:
        raise ValueError(f"one of {expected} is missing")
    return match[1], match.end()
