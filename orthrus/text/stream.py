"""From tokens to text, one by one: incremental detokenisation with stop strings."""

import codecs
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import pre_tokenizers


class TokenBytes(dict[int, bytes]):
    """The bytes that each token stands for. Joined and read as UTF-8 they are the tokenizer's own `decode`.

    A token is looked up when it is first asked for: every token of every stream comes by here.
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
        """Ids past the vocabulary, which padded embeddings have, stand for nothing."""
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


# By identity: a tokenizer is used by many streams, and finding its special tokens takes a millisecond.
token_bytes = lru_cache(maxsize=8)(TokenBytes)


class _Node:
    """A state of the trie of stop strings. `end` is the stop string that ends here."""

    __slots__ = ("children", "end")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.end: str | None = None


@lru_cache(maxsize=256)
def _stop_trie(stop: tuple[str, ...]) -> _Node:
    root = _Node()
    for string in stop:
        node = root
        for character in string:
            node = node.children.setdefault(character, _Node())
        node.end = string
    return root


class TextStream:
    """Incremental detokenisation with stop strings, decided character by character, so that chunking never matters.

    A token's bytes may end inside a character, and text may begin a stop string: both are held back until decided. Of
    several stop strings the one that is complete first counts, of those complete at once the longest.
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

        min_tokens: a stop string that is complete within so many tokens is text as any other. kept: special tokens that
        are text even where others are skipped.
        """
        self.stopped: str | None = None
        self._free = min_tokens
        self._bytes = token_bytes(tokenizer)
        self._skip = self._bytes.special_ids if skip_special_tokens else frozenset()
        if kept:
            self._skip -= {tokenizer.backend_tokenizer.token_to_id(token) for token in kept}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._root = _stop_trie(tuple(stop)) if stop else None
        self._held = ""
        # Where in `_held` each stop string that may be under way begins, and how far it has come: oldest first.
        self._begun: list[tuple[int, _Node]] = []

    def push(self, token_id: int) -> str:
        """Text that is certain after one more token. Once a stop string is found, `stopped` is it and nothing more comes."""
        free = self._free > 0
        self._free -= 1
        if self.stopped is not None or token_id in self._skip:
            return ""
        text = self._utf8.decode(self._bytes[token_id])
        return self._match(text, free) if self._root is not None else text

    def finish(self) -> str:
        """Text still held back, an unfinished character as U+FFFD; call once, at the end."""
        if self.stopped is not None:
            return ""
        return self._held + self._utf8.decode(b"", final=True)

    def _match(self, text: str, free: bool) -> str:
        """Hold `text` back as long as a stop string may begin in it; the part that is decided.

        free: stop strings that are complete in it don't count.
        """
        assert self._root is not None
        checked = len(self._held)
        self._held += text
        for position in range(checked, len(self._held)):
            character = self._held[position]
            self._begun = [
                (start, node.children[character])
                for start, node in (*self._begun, (position, self._root))
                if character in node.children
            ]
            for start, node in self._begun:
                if node.end is not None and not free:
                    self.stopped = node.end
                    return self._held[:start]
        cut = self._begun[0][0] if self._begun else len(self._held)
        certain, self._held = self._held[:cut], self._held[cut:]
        self._begun = [(start - cut, node) for start, node in self._begun]
        return certain
