"""Turns tokens into text one by one: incremental detokenisation with stop strings."""

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import pre_tokenizers


class TokenBytes(dict[int, bytes]):
    """The bytes that each token stands for. Joined and read as UTF-8 they are the tokenizer's own `decode`.

    Each token is looked up once, when it is first asked for, because every token of every stream passes here.
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a fast, byte-level Hugging Face one."""
        super().__init__()
        self._tokenizer = tokenizer.backend_tokenizer
        self.special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )

    def __missing__(self, token_id: int) -> bytes:
        """Ids beyond the vocabulary, which padded embeddings have, stand for no bytes."""
        token = self._tokenizer.id_to_token(token_id) or ""
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in token):
            spelt = bytes(alphabet[character] for character in token)
        else:
            spelt = token.encode()  # An added token, which is plain text.
        self[token_id] = spelt
        return spelt


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of each byte: itself where that is printable, else the next character from U+0100 on."""
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(256) if chr(byte) in letters]
    others = [byte for byte in range(256) if chr(byte) not in letters]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# Cached by the tokenizer's identity: many streams use one, and finding its special tokens takes a millisecond.
token_bytes = lru_cache(maxsize=8)(TokenBytes)


class _Node:
    """A state of Aho and Corasick's automaton: the longest beginning of a stop string that the text ends with."""

    __slots__ = ("children", "depth", "end", "shorter")

    def __init__(self, depth: int = 0) -> None:
        self.children: dict[str, _Node] = {}
        self.depth = depth
        """The length of that beginning."""
        self.end: str | None = None
        """The longest stop string that the text ends with."""
        self.shorter: _Node | None = None
        """The next shorter beginning that the text ends with; None for the state without one."""


# Few, since a set of long stop strings takes 20 MB.
@lru_cache(maxsize=8)
def _stop_automaton(stop: tuple[str, ...]) -> _Node:
    root = _Node()
    for string in stop:
        node = root
        for depth, character in enumerate(string, 1):
            node = node.children.setdefault(character, _Node(depth))
        node.end = string
    waiting = deque([root])
    while waiting:
        node = waiting.popleft()
        for character, child in node.children.items():
            child.shorter = root if node.shorter is None else _next(node.shorter, character, root)
            child.end = child.end or child.shorter.end
            waiting.append(child)
    return root


def _next(node: _Node, character: str, root: _Node) -> _Node:
    """The state after one more character."""
    while character not in node.children and node.shorter is not None:
        node = node.shorter
    return node.children.get(character, root)


class TextStream:
    """Incremental detokenisation with stop strings. It decides character by character, so chunking never matters.

    A token's bytes may end inside a character, and a text may be the beginning of a stop string. Both are held back until they
    are decided. The stop string that is complete first counts. Of several that are complete at once, the longest counts.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        kept: Collection[str] = (),
    ) -> None:
        """tokenizer: a fast, byte-level Hugging Face one. stop: strings that end the text and are left out of it.

        min_tokens: a stop string that is complete within the first `min_tokens` tokens is ordinary text. kept: special tokens
        that are part of the text even if others are skipped.
        """
        self.stopped: str | None = None
        self._free = min_tokens
        self._bytes = token_bytes(tokenizer)
        self._skip = self._bytes.special_ids if skip_special_tokens else frozenset()
        if kept:
            self._skip -= {tokenizer.backend_tokenizer.token_to_id(token) for token in kept}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._root = _stop_automaton(tuple(stop)) if stop else None
        # What stop string may have begun in `_held`.
        self._begun = self._root
        self._held = ""

    def push(self, token_id: int) -> str:
        """Text that is certain after one more token. A stop string that is found is put in `stopped`; no text follows it."""
        free = self._free > 0
        self._free -= 1
        if self.stopped is not None or token_id in self._skip:
            return ""
        text = self._utf8.decode(self._bytes[token_id])
        return self._match(text, free) if self._root is not None else text

    def finish(self) -> str:
        """The text that is still held back, with U+FFFD for an unfinished character. Call it once, at the end."""
        if self.stopped is not None:
            return ""
        return self._held + self._utf8.decode(b"", final=True)

    def _match(self, text: str, free: bool) -> str:
        """Add `text` to what is held back, and return the part of it that can no longer belong to a stop string.

        free: stop strings that are complete in it don't count.
        """
        assert self._root is not None and self._begun is not None
        checked = len(self._held)
        self._held += text
        begun = self._begun
        for position in range(checked, len(self._held)):
            begun = _next(begun, self._held[position], self._root)
            if begun.end is not None and not free:
                self.stopped = begun.end
                return self._held[: position + 1 - len(begun.end)]
        self._begun = begun
        cut = len(self._held) - begun.depth
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain
