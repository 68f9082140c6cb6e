"""Keys of JSON objects that come once: what a grammar can't say of keys that it leaves free.

A JSON text is followed byte by byte, and a token that would end a key for the second time in its object is taken out of the
mask. Where a grammar lets any text pass, as thoughts before the JSON, there is nothing to follow.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from orthrus.json_schema import MAX_KEY


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a JSON text the next byte comes.

    open: the arrays (None) and objects (their keys so far) that are open, outermost first. string: the bytes of a key under
    way, empty in other strings, None outside of strings. escaped: whether a backslash has just come. wants_key: whether
    the next string is a key.
    """

    open: tuple[frozenset[str] | None, ...] = ()
    string: bytes | None = None
    escaped: bool = False
    wants_key: bool = False

    @property
    def in_key(self) -> bool:
        return self.string is not None and self.wants_key

    def after(self, data: bytes) -> "Place | None":
        """The place behind `data`, None if a key in it is one that its object has already."""
        place = self
        start = 0
        while start < len(data):
            if place.string is None:
                place = place._after_mark(data[start : start + 1])
                start += 1
                continue
            end = _string_end(data, start, place.escaped)
            piece = data[start : len(data) if end is None else end]
            string = place.string + piece if place.wants_key else b""
            if end is None:
                return replace(place, string=string, escaped=_leaves_escaped(piece, place.escaped))
            place = replace(place, string=None, escaped=False)
            if place.wants_key:
                keys, key = place.open[-1], _spelled_out(string)
                assert keys is not None, "only objects have keys"
                if key in keys:
                    return None
                place = replace(place, open=(*place.open[:-1], keys | {key}), wants_key=False)
            start = end + 1
        return place

    def _after_mark(self, mark: bytes) -> "Place":
        match mark:
            case b'"':
                return replace(self, string=b"")
            case b"{":
                return replace(self, open=(*self.open, frozenset()), wants_key=True)
            case b"[":
                return replace(self, open=(*self.open, None), wants_key=False)
            case b"}" | b"]":
                return replace(self, open=self.open[:-1], wants_key=False)
            case b",":
                return replace(self, wants_key=bool(self.open) and self.open[-1] is not None)
        return self


def _string_end(data: bytes, start: int, escaped: bool) -> int | None:
    """Where the quote stands that ends a string."""
    for i in range(start, len(data)):
        if escaped:
            escaped = False
        elif data[i] == 0x5C:
            escaped = True
        elif data[i] == 0x22:
            return i
    return None


def _leaves_escaped(piece: bytes, escaped: bool) -> bool:
    backslashes = len(piece) - len(piece.rstrip(b"\\"))
    return (backslashes + (escaped and backslashes == len(piece))) % 2 == 1


def _spelled_out(string: bytes) -> str:
    """A key as what it means; two spellings of one key are one key."""
    try:
        return str(json.loads(b'"' + string + b'"'))
    except ValueError:
        return string.decode(errors="replace")


class KeyTokens:
    """What the tokens of a vocabulary do to keys. texts: the bytes of each."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = texts
        quoted = [token for token, text in enumerate(texts) if b'"' in text]
        # By what they end a key with; those that begin with a backslash or have several quotes must be followed.
        self.ending: dict[bytes, list[int]] = {}
        unclear: list[int] = []
        for token in quoted:
            before = texts[token].partition(b'"')[0]
            if b"\\" in before or texts[token].count(b'"') > 1:
                unclear.append(token)
            if b"\\" not in before:
                self.ending.setdefault(before, []).append(token)
        self._quoted, self._unclear = np.array(quoted, np.int64), np.array(unclear, np.int64)
        # Both may come only where anything may: JSON has no raw line end in a string, and no z elsewhere.
        self._anything = np.array([texts.index(text) for text in (b"\n", b"z") if text in texts], np.int64)

    def follows_nothing(self, row: Tensor) -> bool:
        """Whether a mask of one position, int32 [ceil(vocab_size / 32)], lets any text pass."""
        return len(self._anything) == 2 == len(_those_set(row, self._anything))

    def forbid(self, row: Tensor, place: Place) -> bool:
        """Clear the bits of tokens that bring a key again; False, and nothing cleared, if none would be left."""
        repeating = self._repeating(row, place)
        if not repeating:
            return True
        before = row.clone()
        for token in repeating:
            row[token // 32] &= ~(1 << token % 32) if token % 32 != 31 else 0x7FFFFFFF
        if row.any():
            return True
        row.copy_(before)
        return False

    def _repeating(self, row: Tensor, place: Place) -> list[int]:
        if not any(place.open):
            return []
        followed = self._unclear
        repeating: list[int] = []
        if place.in_key and place.open[-1]:
            assert place.string is not None
            if b"\\" in place.string or place.escaped:
                followed = self._quoted
            else:
                for key in place.open[-1]:
                    spelled = json.dumps(key, ensure_ascii=False)[1:-1].encode(errors="replace")
                    if spelled.startswith(place.string):
                        rest = spelled[len(place.string) :]
                        repeating += self.ending.get(rest, ())
                        # A key of full length can only end.
                        if rest and len(key) >= MAX_KEY:
                            repeating += [token for token, text in enumerate(self.texts) if text == rest]
        unclear = [token for token in _those_set(row, followed) if place.after(self.texts[token]) is None]
        return repeating + unclear


def _those_set(row: Tensor, tokens: np.ndarray) -> list[int]:
    """Those of `tokens` whose bit is set."""
    words = row.numpy()
    found: list[int] = tokens[words[tokens // 32] >> tokens % 32 & 1 == 1].tolist()
    return found
