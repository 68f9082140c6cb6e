"""vLLM's `bad_words` and `allowed_token_ids` as a `TokenMask`: words and tokens that an answer must not contain."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthrus.errors import RequestError
from orthrus.text.token_mask import TokenMask

_NOTHING_LEFT = "bad_words and allowed_token_ids leave no token"


class WordRules:
    """What `bad_words` and `allowed_token_ids` of a request forbid. All choices of the request share it."""

    def __init__(
        self, tokenizer: Any, vocab_size: int, bad_words: Sequence[str], allowed: Sequence[int] | None
    ) -> None:
        """tokenizer: a Hugging Face one, needed for bad words only. Raises RequestError naming the field."""
        # One bit per token, lowest first, as `TokenMask.allowed` has them.
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        if allowed is None:
            bits[:vocab_size] = 1
        else:
            _check_ids(allowed, vocab_size)
            bits[list(allowed)] = 1
        # For words of several tokens: the last token of each, by the tokens before it.
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for *start, end in _spellings(bad_words, tokenizer):
            if start:
                self._ends.setdefault(tuple(start), []).append(end)
            else:
                bits[end] = 0
        if not bits.any():
            raise RequestError(f"{_NOTHING_LEFT}: allow more", "bad_words")
        # The mask where no word of several tokens is about to end.
        self.free = np.packbits(bits, bitorder="little").view(np.int32)
        self._lengths = sorted({len(start) for start in self._ends})

    @property
    def memory(self) -> int:
        """How many of the newest tokens decide what may follow."""
        return self._lengths[-1] if self._lengths else 0

    def row(self, before: Sequence[int]) -> np.ndarray:
        """Which tokens may follow the generated tokens `before`, perhaps none: int32 [ceil(vocab_size / 32)], one bit each."""
        ends = [
            end
            for length in self._lengths
            if length <= len(before)
            for end in self._ends.get(tuple(before[len(before) - length :]), ())
        ]
        if not ends:
            return self.free
        row = self.free.copy()
        words = row.view(np.uint32)
        for end in ends:
            words[end // 32] &= ~np.uint32(1 << end % 32)
        return row


class WordMask:
    """The `TokenMask` of one sequence under `WordRules`."""

    param = "bad_words"

    def __init__(self, rules: WordRules) -> None:
        self.error: str | None = None
        self._rules = rules
        self._newest: list[int] = []

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        tokens = [*self._newest, *ahead]
        ends = range(len(self._newest) + first, len(tokens) + 1)
        rows = [self._rules.row(tokens[:end]) for end in ends]
        # If no token is left, everything free is allowed, and `commit` notes the error.
        return torch.from_numpy(np.stack([row if row.any() else self._rules.free for row in rows]))

    def accepts(self, tokens: Sequence[int]) -> int:
        before = list(self._newest)
        for count, token in enumerate(tokens):
            if not self._rules.row(before)[token // 32] >> token % 32 & 1:
                return count
            before.append(token)
        return len(tokens)

    def commit(self, token: int) -> None:
        if not self.accepts([token]):
            self.error = f"{_NOTHING_LEFT} to go on with: allow more"
        self._newest.append(token)
        # Only the tokens before a word's last one are needed.
        del self._newest[: max(0, len(self._newest) - self._rules.memory)]


class JointMask:
    """The tokens that all of several masks allow. If there are none, only the first mask counts. `commit` then sets `error`."""

    def __init__(self, *masks: TokenMask) -> None:
        self._masks = masks

    @property
    def _failed(self) -> TokenMask | None:
        return next((mask for mask in self._masks if mask.error is not None), None)

    @property
    def error(self) -> str | None:
        return self._failed.error if self._failed is not None else None

    @property
    def param(self) -> str:
        return (self._failed or self._masks[0]).param

    def allowed(self, ahead: Sequence[int], first: int = 0) -> Tensor:
        rows = [mask.allowed(ahead, first) for mask in self._masks]
        joint = rows[0].clone()
        for others in rows[1:]:
            joint &= others
        return torch.where(joint.any(-1, keepdim=True), joint, rows[0])

    def accepts(self, tokens: Sequence[int]) -> int:
        return min(mask.accepts(tokens) for mask in self._masks)

    def commit(self, token: int) -> None:
        for mask in self._masks:
            mask.commit(token)


def _check_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    if any(not 0 <= token < vocab_size for token in token_ids):
        raise RequestError(f"allowed_token_ids must be between 0 and {vocab_size - 1}", "allowed_token_ids")


def _spellings(words: Sequence[str], tokenizer: Any) -> set[tuple[int, ...]]:
    """The tokens of each word, both at the beginning of a text and after a blank."""
    if words and tokenizer is None:
        raise RequestError("bad words need a tokenizer, and this model was loaded without one", "bad_words")
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {tuple(tokens) for tokens in encoded if tokens}
