"""Forbid that an object of a JSON text has a key twice. A grammar can't forbid that for keys that it leaves free.

The JSON text is followed byte by byte. A token that would end a key which its object already has is taken out of the mask.
Where a grammar allows any text, such as thoughts before the JSON, nothing is followed.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from orthrus.text.json_schema.bounds import MAX_KEY

_MOST_LOOKED_BEHIND = 16
"""At each position, at most so many tokens are checked for whether the answer could go on after them. Each takes a mask."""


@dataclass(frozen=True, slots=True)
class Place:
    """The state of a JSON text between two of its bytes."""

    # The open arrays and objects, outermost first: None for an array, the sorted keys so far for an object, spelled as
    # `_spelled_out` does.
    open: tuple[tuple[bytes, ...] | None, ...] = ()
    # Inside a key, its bytes so far. Inside any other string, empty. Outside of strings, None.
    string: bytes | None = None
    # Whether the last byte was a backslash that escapes the next one.
    escaped: bool = False
    # Whether the next string, or the current one, is a key.
    wants_key: bool = False

    @property
    def in_key(self) -> bool:
        return self.string is not None and self.wants_key

    def after(self, data: bytes) -> "Place | None":
        """The place after `data`. None if `data` ends a key that its object already has."""
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
                at = bisect_left(keys, key)
                if keys[at : at + 1] == (key,):
                    return None
                keys = (*keys[:at], key, *keys[at:])
                place = replace(place, open=(*place.open[:-1], keys), wants_key=False)
            start = end + 1
        return place

    def rests(self) -> Iterator[tuple[bytes, bytes]]:
        """The object's keys that begin like the unfinished key, each with the bytes that the unfinished key lacks."""
        keys = self.open[-1] if self.in_key else None
        if not keys or self.string is None:
            return
        for i in range(bisect_left(keys, self.string), len(keys)):
            if not keys[i].startswith(self.string):
                return
            yield keys[i], keys[i][len(self.string) :]

    def _after_mark(self, mark: bytes) -> "Place":
        match mark:
            case b'"':
                return replace(self, string=b"")
            case b"{":
                return replace(self, open=(*self.open, ()), wants_key=True)
            case b"[":
                return replace(self, open=(*self.open, None), wants_key=False)
            case b"}" | b"]":
                return replace(self, open=self.open[:-1], wants_key=False)
            case b",":
                return replace(self, wants_key=bool(self.open) and self.open[-1] is not None)
        return self


def _string_end(data: bytes, start: int, escaped: bool) -> int | None:
    """The index of the quote that ends a string. None if it is not in `data`."""
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


def _spelled_out(string: bytes) -> bytes:
    """A key as JSON spells it with the fewest escapes. So all spellings of a key become the same."""
    try:
        key = str(json.loads(b'"' + string + b'"'))
    except ValueError:
        key = string.decode(errors="replace")
    return json.dumps(key, ensure_ascii=False)[1:-1].encode(errors="surrogatepass")


class KeyTokens:
    """Which tokens of a vocabulary end which keys."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        # The bytes of each token.
        self.texts = texts
        self._whole: dict[bytes, list[int]] = {}
        for token, text in enumerate(texts):
            self._whole.setdefault(text, []).append(token)
        quoted = [token for token, text in enumerate(texts) if b'"' in text]
        # Tokens with a quote, by the bytes before the quote. Those with a backslash before it, or with several quotes, are
        # unclear: their effect has to be worked out byte by byte.
        self._ending: dict[bytes, list[int]] = {}
        unclear: list[int] = []
        for token in quoted:
            before = texts[token].partition(b'"')[0]
            if b"\\" in before or texts[token].count(b'"') > 1:
                unclear.append(token)
            if b"\\" not in before:
                self._ending.setdefault(before, []).append(token)
        self._quoted, self._unclear = np.array(quoted, np.int64), np.array(unclear, np.int64)
        # If both of these tokens are allowed, any text is: JSON allows no line end inside a string, and no z outside of one.
        self._anything = np.array(
            [self._whole[text][0] for text in (b"\n", b"z") if text in self._whole], np.int64
        )

    def follows_nothing(self, row: Tensor) -> bool:
        """Whether a mask of one position, int32 [ceil(vocab_size / 32)], allows any text."""
        return len(self._anything) == 2 == len(_those_set(row, self._anything))

    def forbid(self, row: Tensor, place: Place, behind: Callable[[int], Tensor]) -> bool:
        """Clear the bits of tokens that repeat a key. If none would be left, clear nothing and return False.

        behind: gives the mask of the position after a token.
        """
        repeating = self._repeating(row, place) + self._dead_ends(row, place, behind)
        if not repeating:
            return True
        left = _without(row, repeating)
        if not left.any():
            return False
        row.copy_(left)
        return True

    def _repeating(self, row: Tensor, place: Place) -> list[int]:
        """The tokens that end a key which its object already has."""
        if not any(place.open):
            return []
        followed = self._unclear
        repeating: list[int] = []
        if place.in_key and place.open[-1]:
            assert place.string is not None
            if b"\\" in place.string or place.escaped:
                followed = self._quoted
            else:
                repeating = [token for _, rest in place.rests() for token in self._ending.get(rest, ())]
        unclear = [token for token in _those_set(row, followed) if place.after(self.texts[token]) is None]
        return repeating + unclear

    def _dead_ends(self, row: Tensor, place: Place, behind: Callable[[int], Tensor]) -> list[int]:
        """The tokens that bring a repeated key to its full length, so that only its forbidden end could follow."""
        complete = [
            token
            for key, rest in place.rests()
            if rest and len(key) >= MAX_KEY
            for token in self._whole.get(rest, ())
        ]
        dead: list[int] = []
        for token in _those_set(row, np.array(complete, np.int64))[:_MOST_LOOKED_BEHIND]:
            # A longer key that the schema names may begin like this one.
            next_row, next_place = behind(token), place.after(self.texts[token])
            assert next_place is not None, "a token without a quote ends no key"
            if not _without(next_row, self._repeating(next_row, next_place)).any():
                dead.append(token)
        return dead


def _without(row: Tensor, tokens: Sequence[int]) -> Tensor:
    """A copy of a row of a mask without the bits of `tokens`."""
    left = row.clone()
    which = np.array(tokens, np.int64)
    bits = np.uint32(1) << (which % 32).astype(np.uint32)
    np.bitwise_and.at(left.numpy().view(np.uint32), which // 32, ~bits)
    return left


def _those_set(row: Tensor, tokens: np.ndarray) -> list[int]:
    """Those of `tokens` whose bit is set."""
    words = row.numpy()
    found: list[int] = tokens[words[tokens // 32] >> tokens % 32 & 1 == 1].tolist()
    return found
