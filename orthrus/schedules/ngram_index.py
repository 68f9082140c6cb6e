"""Finds where the newest tokens of a sequence have occurred in it before: the lookup for n-gram drafts (prompt lookup)."""

from typing import NamedTuple

_MOST_AT_ONCE = 4096
"""Most tokens that one lookup adds to the index: a long prompt must not hold up the other sequences."""
_CANDIDATES = 16
"""Most earlier occurrences that a lookup compares, the latest first."""


class Match(NamedTuple):
    """An earlier occurrence of the newest tokens."""

    length: int
    """How many of the newest tokens occur there."""
    end: int
    """Position of the last of them there."""


class NgramIndex:
    """An index over the tokens of one sequence. Adding a token takes constant time.

    For each position, it holds the last earlier position at which the same n-gram of the shortest length ends, or one with the
    same hash. A lookup follows these links and compares tokens.
    """

    def __init__(self, tokens: list[int], shortest: int, longest: int) -> None:
        """tokens: the sequence's own list, which grows. shortest, longest: how many tokens are to match."""
        self._tokens = tokens
        self._shortest, self._longest = shortest, longest
        self._last: dict[int, int] = {}  # By hash of an n-gram: the last position at which it ends.
        self._before: list[int] = [-1] * (shortest - 1)  # By position: an earlier one, or -1.

    def match(self) -> Match | None:
        """The longest match of the newest tokens, and of these the latest one. None if there is none."""
        self._extend()
        tokens, end = self._tokens, len(self._tokens) - 1
        best = Match(self._shortest - 1, -1)
        at = self._before[end] if end < len(self._before) else -1
        for _ in range(_CANDIDATES):
            if at < 0 or best.length == self._longest:
                break
            most = min(self._longest, at + 1)
            length = 0
            while length < most and tokens[at - length] == tokens[end - length]:
                length += 1
            if length > best.length:
                best = Match(length, at)
            at = self._before[at]
        return best if best.end >= 0 else None

    def continuation(self, match: Match, count: int) -> list[int]:
        """The `count` tokens that followed a match of the newest tokens.

        If the text ends before that, the tokens that followed the match are repeated.
        """
        first = match.end + 1
        period = len(self._tokens) - first
        if count <= period:
            return self._tokens[first : first + count]
        return [self._tokens[first + place % period] for place in range(count)]

    def _extend(self) -> None:
        """Add the tokens that have come since the last lookup, at most `_MOST_AT_ONCE`."""
        start, last, before = len(self._before), self._last, self._before
        begin, end = start - self._shortest + 1, start + _MOST_AT_ONCE
        parts = (
            self._tokens[begin + place : end - self._shortest + 1 + place] for place in range(self._shortest)
        )
        grams = zip(*parts, strict=False)
        for position, gram in enumerate(map(hash, grams), start):
            before.append(last.get(gram, -1))
            last[gram] = position
